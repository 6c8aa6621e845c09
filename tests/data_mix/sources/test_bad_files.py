"""Retries: as many as there are waits, unless the error is not worth it."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest

from data_mix.sources import bad_files
from data_mix.sources.bad_files import one_line, retry


@pytest.mark.parametrize("num_failures", [0, 2, 3, 9])
def test_an_action_is_repeated_until_it_succeeds(num_failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(bad_files.time, "sleep", waits.append)
    action = Mock(side_effect=[*[OSError("busy")] * num_failures, "done"])
    with pytest.raises(OSError, match="busy") if num_failures > 3 else nullcontext():
        assert retry(action, where="test") == "done"
    assert waits == list(bad_files.RETRY_WAITS_S[:num_failures]) and action.call_count == len(waits) + 1


def test_an_error_that_is_not_worth_it_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_files.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 // 0, where="test", is_worth_it=lambda error, _: not isinstance(error, ZeroDivisionError))


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b" and len(one_line(ValueError("x" * 999))) == 300
