"""Packed training through the real engine: the losses of unpacked sequences, and the counts of a run after a stop."""

import pytest

from tests.helpers.survive import computed_metrics
from tests.train.conftest import arguments, losses, train_apart, train_here
from tests.train.test_resume import kill_and_resume
from um3.core.metrics import read_metrics

PACKED = "data.packing=documents"
# Without packing, the documents of a text sequence attend to each other.
NO_TEXT = ["data.mix.start=[0,1,2]", "data.mix.end=[0,1,2]"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_packed_training_has_the_losses_of_one_sample_a_sequence(processes, made, tmp_path):
    train_here("um3", made, tmp_path / "plain", *NO_TEXT)
    if processes == 1:
        # Eight samples in four micro-batches: three sequences of up to three samples, and one of padding alone.
        train_here("um3", made, tmp_path / "packed", *NO_TEXT, PACKED, "loop.micro_batch_size=2")
    else:
        train_apart(arguments("um3", made, f"loop.output_dir={tmp_path}/packed", *NO_TEXT, PACKED), processes=2)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    plain, packed = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("plain", "packed"))
    same = [key for key in plain if key.startswith("data/") and key != "data/padding"]
    assert {f"data/samples/{task}/scenes" for task in ("i2t", "t2i")} < set(same)
    assert {key: packed[key] for key in same} == {key: plain[key] for key in same}


@pytest.mark.slow
def test_a_killed_packed_run_resumes_with_its_counts(made, tmp_path, monkeypatch):
    train_here("um3", made, tmp_path / "whole", PACKED)
    kill_and_resume(arguments("um3", made, f"loop.output_dir={tmp_path}/killed", PACKED), 3, monkeypatch)
    whole = computed_metrics(tmp_path / "whole")
    assert computed_metrics(tmp_path / "killed") == whole
    counts = {key: whole[-1][key] for key in whole[-1] if key.startswith("data/samples/") and key.count("/") == 3}
    assert sum(counts.values()) == 4 * 8
    assert all(abs(count - whole[-1][key.replace("samples", "scheduled")]) < 1 for key, count in counts.items())
