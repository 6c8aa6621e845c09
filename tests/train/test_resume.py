"""Runs that are stopped, killed, damaged or asked for twice."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.survive import long_run, outcome
from tests.train.conftest import arguments, losses, run_here
from train import checkpoint, loop
from um3.core.errors import Interrupted, UserError
from um3.core.metrics import read_metrics


class Killed(Exception):
    """Stands for a kill between two steps."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = loop._guarded_step

    def guarded(task: loop.Task, *, limit: int = step, **options: Any) -> dict[str, float]:
        if options["step"] >= limit:
            raise Killed
        return real(task, **options)

    monkeypatch.setattr(loop, "_guarded_step", guarded)


@pytest.mark.parametrize(("kind", "zero_stage"), [("adamw", 0), ("adamw", 2), ("adamw", 3), ("muon", 0), ("muon", 2)])
def test_a_checkpoint_fits_any_zero_stage(
    kind: str, zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = f"optimizer.kind={kind}"
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/whole", optimizer))
    moved = arguments("um3", made, f"loop.output_dir={tmp_path}/moved", optimizer)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_here(patch, moved)
    run_here(monkeypatch, [*moved, f"engine.zero_stage={zero_stage}"])
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_finished_phase_is_not_done_again(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made / "stage1/done.json").stat().st_mtime_ns
    run_here(monkeypatch, arguments("stage1", made))
    assert "up to date" in capsys.readouterr().out
    assert (made / "stage1/done.json").stat().st_mtime_ns == before


def test_other_settings_and_other_inputs_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.003 -> 0\.1"):
        run_here(monkeypatch, arguments("stage1", made, "optimizer.lr=0.1"))
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    shutil.copy(copied / "stage2/model/model.safetensors", copied / "stage1/model/model.safetensors")
    with pytest.raises(UserError, match="other inputs"):
        run_here(monkeypatch, arguments("stage2", copied))


@pytest.mark.parametrize(("phase", "needs"), [("stage2", "make stage1"), ("um3", "make stage2")])
def test_a_phase_before_its_turn_names_the_one_to_run(
    phase: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=needs):
        run_here(monkeypatch, arguments(phase, tmp_path))


def test_um3_before_codes_says_so(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = arguments("um3", made, f"loop.output_dir={tmp_path}/um3", f"data.codes={tmp_path}/none")
    with pytest.raises(UserError, match="make codes"):
        run_here(monkeypatch, command)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-00000002" / path.name, path)


DAMAGES = [flip, cut, swap, Path.unlink]


@pytest.fixture
def stopped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Command line and checkpoints of a run of 6 steps that was stopped after its 5th, with those of steps 2 and 4."""
    command = arguments("stage1", made, f"loop.output_dir={tmp_path}/run", "loop.max_steps=6")
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            run_here(patch, command)
    return command, tmp_path / "run/checkpoints"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model-00000.safetensors", "meta.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    file: str,
    damage: Callable[[Path], None],
    stopped: tuple[list[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, folder = stopped
    damage(folder / "step-00000004" / file)
    with caplog.at_level("WARNING"):
        assert checkpoint.find_checkpoint(folder) == folder / "step-00000002"
    assert f"step-00000004 is damaged ({file})" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.damaged"]


def test_from_the_checkpoint_before_the_run_computes_the_same_bits(
    stopped: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, folder = stopped
    run_here(monkeypatch, [*command, f"loop.output_dir={tmp_path}/whole"])
    flip(folder / "step-00000004/model-00000.safetensors")
    (folder / "step-00000006.partial").mkdir()  # what a kill in the middle of a save leaves
    run_here(monkeypatch, command)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_without_a_whole_checkpoint_nothing_is_trained_over(
    stopped: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, folder = stopped
    flip(folder / "step-00000002/model-00000.safetensors")
    Path.unlink(folder / "step-00000004/meta.json")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(
        UserError, match=r"no checkpoint .* is whole \(step-00000004: meta.json; step-00000002: model-0"
    ):
        run_here(monkeypatch, command)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_only_half_a_checkpoint_is_no_checkpoint(
    stopped: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its first save, a run begins anew: no work was kept that could be lost."""
    command, folder = stopped
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000004").rename(folder / "step-00000002.partial")
    run_here(monkeypatch, command)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_without_its_own_digest_is_read(stopped: tuple[list[str], Path]) -> None:
    """As they were written before meta.json had one."""
    _, folder = stopped
    path = folder / "step-00000004/meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"], meta["state"]["means"]
    path.write_text(json.dumps(meta))
    assert checkpoint.find_checkpoint(folder) == path.parent
    checkpoint.remove_old(folder, keep=1, best_by="train/loss")
    assert {path.name for path in folder.iterdir()} == {"step-00000002", "step-00000004"}  # the one with a mean is best


@pytest.mark.parametrize(("best_by", "kept"), [("train/loss", [3, 7, 8]), ("optim/lr", [7, 8]), ('""', [7, 8])])
def test_the_newest_checkpoints_and_the_best_stay(
    best_by: str, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._guarded_step

    def with_its_lowest_loss_at_step_3(task: loop.Task, **options: Any) -> dict[str, float]:
        return real(task, **options) | {"train/loss": float(abs(options["step"] + 1 - 3))}

    monkeypatch.setattr(loop, "_guarded_step", with_its_lowest_loss_at_step_3)
    options = ["loop.max_steps=8", "loop.save_every_steps=1", f"loop.keep_best_by={best_by}"]
    run_here(monkeypatch, arguments("stage1", tmp_path, *options))
    folder = tmp_path / "stage1/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in kept]
    if best_by == "train/loss":
        assert checkpoint.read_meta(folder / "step-00000003")["state"]["means"] == {"train/loss": 0.0}


def test_a_metric_that_no_step_has_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, arguments("stage1", tmp_path, "loop.keep_best_by=train/los", "loop.max_steps=2"))
    said = capsys.readouterr().err
    assert "keep_best_by: no step has 'train/los'; there are " in said and "train/loss" in said


def test_a_loss_that_is_not_finite_loses_nothing_and_the_line_says_how_to_go_on(
    stopped: tuple[list[str], Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, folder = stopped
    shutil.copytree(folder, tmp_path / "hot/checkpoints")
    hot = [*command, f"loop.output_dir={tmp_path}/hot", "optimizer.lr=1e30", "loop.save_every_steps=1"]
    with pytest.raises(UserError, match=r"step 6: train/mse is (nan|inf).* on rank 0 \(images of scenes: .* is kept"):
        run_here(monkeypatch, hot)
    kept = sorted(path.name for path in (tmp_path / "hot/checkpoints").iterdir())
    assert kept[-1] == "step-00000005" and "step-00000004" in kept  # of the step before, and before that
    assert [row["step"] for row in read_metrics(tmp_path / "hot/metrics.jsonl")] == [5]
    # What it advises: another folder, a copy of the checkpoints, a lower rate.
    shutil.rmtree(tmp_path / "hot/checkpoints/step-00000005")
    shutil.copytree(tmp_path / "hot/checkpoints", tmp_path / "cool/checkpoints")
    run_here(monkeypatch, [*command, f"loop.output_dir={tmp_path}/cool"])
    run_here(monkeypatch, command)
    assert outcome(tmp_path / "cool")["model"] == outcome(tmp_path / "run")["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["vocabulary.text_vocab_size=300"], "the checkpoint of step 2 was trained with text vocabulary"),
        (
            ["vocabulary.subtokens=3", "vocabulary.bits_per_subtoken=4"],
            r"step-00000002 holds '\S+' \(448, 32\), this model has \(368, 32\)",
        ),
    ],
)
def test_a_checkpoint_of_another_vocabulary_is_refused(
    changes: list[str], message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*long_run("um3", made, steps=2), "data.seq_len=80", f"loop.output_dir={tmp_path}/first"]
    run_here(monkeypatch, command)
    folder = tmp_path / "other/checkpoints"
    shutil.copytree(tmp_path / "first/checkpoints", folder)
    with pytest.raises(UserError, match=message):
        run_here(monkeypatch, [*command, f"loop.output_dir={tmp_path}/other", *changes])
    assert checkpoint.find_checkpoint(folder) == folder / "step-00000002"
    assert not (tmp_path / "other/done.json").exists()


def test_a_run_does_not_go_on_with_other_inputs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, arguments("stage1", tmp_path, "loop.seed=5"))
    command = arguments("stage2", made, f"loop.output_dir={tmp_path}/stage2")
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_here(patch, command)
    with pytest.raises(UserError, match=r"step-00000002 was trained from other inputs \({'tokenizer': "):
        run_here(monkeypatch, [*command, f"init_from={tmp_path}/stage1/model"])


def test_sigterm_inside_the_process_is_an_orderly_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._guarded_step

    def guarded(task: loop.Task, **options: Any) -> dict[str, float]:
        if options["step"] == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(task, **options)

    monkeypatch.setattr(loop, "_guarded_step", guarded)
    with pytest.raises((Interrupted, SystemExit)):
        run_here(monkeypatch, arguments("stage1", tmp_path))
    assert (tmp_path / "stage1/checkpoints/step-00000003/meta.json").exists()
    assert not (tmp_path / "stage1/done.json").exists()
