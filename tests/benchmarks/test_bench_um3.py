"""The benchmark of UM3's training runs both sides at a small size, on the same rows."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import um3_training
from um3.core.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = ["--shape", "width=32", "layers=1", "heads=2", "kv_heads=1", "intermediate_size=48", "entries=300"]
ROWS = ["loop.batch_size=4", "loop.micro_batch_size=2", "data.seq_len=600", "data.packing=documents"]
CPU = ["engine.precision=auto", "engine.activation_checkpointing=false", "loop.num_threads=1"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", str(ROOT / "configs/paper"), *arguments])
    um3_training.main()


@pytest.mark.slow
def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mix = ["data.mix.end=[2, 1, 1]", "data.mix.calm_down_steps=0"]
    call(monkeypatch, *SMALL, "--steps", "2", "--warmup", "1", "--peak-tflops", "0.1", *ROWS, *CPU, *mix)
    ours, stock, numbers = capsys.readouterr().out.splitlines()
    assert "tokens/s" in ours and "0.1 TFLOP/s (given, float32)" in ours
    assert "as fast with" in stock
    found = json.loads(numbers)
    assert all(len(found[side]["step_s"]) == 2 and found[side]["peak_gib"] > 0 for side in ("ours", "stock"))
    # Every step: two rows of text, an image to its caption and back; the formula counts what the rows hold.
    assert found["tokens_per_step"] == 2 * 600 + 2 * (512 + 64 + 4)
    seconds = sum(found["ours"]["step_s"]) / 2
    assert found["utilisation"] == pytest.approx(found["flops_per_step"] / seconds / 1e11)


def test_what_it_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--steps", "0"], "--steps is 0"),
        (["--shape", "depth=3"], "--shape depth=3: give width"),
        (["--shape", "width=30", "heads=4"], "divide the width"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, *arguments)
