"""Packed training through the real engine: the losses of unpacked rows, and the counts of a whole run after a stop."""

from pathlib import Path

import pytest

from tests.train.conftest import arguments, losses, run_apart, run_here
from tests.train.test_resume import Killed, kill_after
from um3.core.metrics import read_metrics

PACKED = "data.packing=documents"
NO_TEXT = [
    "data.mix.start=[0,1,2]",
    "data.mix.end=[0,1,2]",
]  # a row of text holds documents that see each other unpacked


def test_packed_training_has_the_losses_of_one_sample_a_row(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/plain", *NO_TEXT))
    # Eight samples in four parts: three rows of up to three samples, and one of padding alone.
    parts = [*NO_TEXT, PACKED, "loop.micro_batch_size=2"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/packed", *parts))
    finished = run_apart(arguments("um3", made, f"loop.output_dir={tmp_path}/two", *NO_TEXT, PACKED), processes=2)
    assert finished.returncode == 0, finished.stderr
    plain = read_metrics(tmp_path / "plain/metrics.jsonl")[-1]
    same = [key for key in plain if key.startswith("data/") and key != "data/padding"]
    assert {f"data/samples/{task}/scenes" for task in ("i2t", "t2i")} < set(same)
    for run in ("packed", "two"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
        other = read_metrics(tmp_path / run / "metrics.jsonl")[-1]
        assert {key: other[key] for key in same} == {key: plain[key] for key in same}


def test_a_killed_packed_run_resumes_with_its_counts(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/whole", PACKED))
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_here(patch, arguments("um3", made, f"loop.output_dir={tmp_path}/killed", PACKED))
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/killed", PACKED))
    whole, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    for row, other in zip(whole, killed, strict=True):
        assert {key: row[key] for key in row if not key.startswith(("perf/", "mem/"))} == {
            key: other[key] for key in other if not key.startswith(("perf/", "mem/"))
        }
    counted = {
        key: value for key, value in whole[-1].items() if key.startswith("data/samples/") and key.count("/") == 3
    }
    assert sum(counted.values()) == 4 * 8
    assert all(abs(count - whole[-1][key.replace("samples", "scheduled")]) < 1 for key, count in counted.items())
