"""The benchmark of sampling runs at a small size, compares like with like, and sees other ids."""

import json
import sys

import pytest
import torch

from benchmarks import sampling
from um3.core.errors import UserError

SMALL = ["--patches", "4", "--width", "64", "--layers", "1", "--text-vocab-size", "300", "--bits-per-subtoken", "4"]
SMALL += ["--repeats", "2", "--batch", "3", "--threads", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *arguments])
    sampling.main()


@pytest.mark.parametrize("scale", ["1", "3"])
def test_all_sides_draw_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    run(monkeypatch, "--guidance-scale", scale)
    lines = capsys.readouterr().out.splitlines()
    assert sum("3 of 3 images equal to the id" in line for line in lines) == 2
    assert any(line.startswith("memory bound ") for line in lines)
    found = json.loads(lines[-1])
    assert found["bound_ms"] > 0 and found["guidance_scale"] == float(scale)
    for side in sampling.SIDES:
        assert len(found[side]) == 2
        assert all(value > 0 for each in found[side] for pair in each.values() for value in pair)


def test_guidance_changes_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL])
    setting = sampling._build(sampling._options())
    guided, plain = (sampling._ours(setting._replace(scale=scale), []) for scale in (3.0, 1.0))
    assert not torch.equal(guided, plain) and len({tuple(row) for row in guided.tolist()}) == 3


def test_other_ids_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = sampling._ours
    monkeypatch.setattr(sampling, "_ours", lambda setting, moments: ours(setting, moments) + 1)
    with pytest.raises(UserError, match="ours and stock drew different ids"):
        run(monkeypatch, "--sides", "ours", "stock")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--bits-per-subtoken", "21"], "--bits-per-subtoken is 21; at most 20"),
        (["--text-vocab-size", "5"], "--text-vocab-size is 5; at least 8"),
        (["--sides", "stock", "ours"], "it must begin with ours"),
    ],
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)
