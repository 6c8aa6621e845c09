"""Retries: as many as there are waits, unless the error is not worth it."""

import pytest

from data_mix import retry as retry_module
from data_mix.retry import one_line, retry


@pytest.mark.parametrize(("num_failures", "num_calls"), [(0, 1), (2, 3), (3, 4), (9, 4)])
def test_an_action_is_repeated_until_it_succeeds(
    num_failures: int, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry_module.time, "sleep", waits.append)
    calls: list[int] = []

    def action() -> str:
        calls.append(1)
        if len(calls) <= num_failures:
            raise OSError("busy")
        return "done"

    if num_failures < 4:
        assert retry(action, where="test") == "done"
    else:
        with pytest.raises(OSError, match="busy"):
            retry(action, where="test")
    assert len(calls) == num_calls and waits == list(retry_module.RETRY_WAITS_S[: num_calls - 1])


def test_an_error_that_is_not_worth_it_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 // 0, where="test", is_worth_it=lambda error, _: not isinstance(error, ZeroDivisionError))


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b" and len(one_line(ValueError("x" * 999))) == 300
