"""Runs that are stopped, killed, damaged or started twice."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.survive import long_run, outcome
from tests.train.conftest import arguments, logged, losses, train_here
from train import checkpoint, loop
from train.phase import main
from um3.core.errors import Interrupted, UserError


class Killed(Exception):
    """Stands for a kill between two steps."""


def kill_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Raise `Killed` instead of taking any step after `step` steps."""
    real = loop._train_step

    def train_step(task: loop.Task, **options: Any) -> dict[str, float]:
        if options["step"] >= step:
            raise Killed
        return real(task, **options)

    patch.setattr(loop, "_train_step", train_step)


def kill(command: Sequence[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `command`, killed after `step` steps."""
    with monkeypatch.context() as patch:
        kill_after(patch, step)
        with pytest.raises(Killed):
            main(command)


def kill_and_resume(command: Sequence[str], step: int, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
    """Run `command`, killed after `step` steps, then again to its end with `changes`."""
    kill(command, step, monkeypatch)
    main([*command, *changes])


ENGINES = [("adamw", 0), ("adamw", 2), ("adamw", 3), ("muon", 0), ("muon", 2)]


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [engine if engine == ("adamw", 2) else pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES],
)
def test_a_checkpoint_loads_at_any_zero_stage(
    kind: str, zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = f"optimizer.kind={kind}"
    whole = losses(made / "um3") if kind == "adamw" else train_here("um3", made, tmp_path / "whole", optimizer)
    command = arguments("um3", made, f"loop.output_dir={tmp_path}/moved", optimizer)
    kill_and_resume(command, 2, monkeypatch, f"engine.zero_stage={zero_stage}")
    assert losses(tmp_path / "moved") == pytest.approx(whole, rel=1e-5)


def test_a_finished_phase_is_not_run_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made / "stage1/done.json").stat().st_mtime_ns
    main(arguments("stage1", made))
    assert "up to date" in capsys.readouterr().out
    assert (made / "stage1/done.json").stat().st_mtime_ns == before


def test_other_settings_and_other_inputs_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.003 -> 0\.1"):
        main(arguments("stage1", made, "optimizer.lr=0.1"))
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    shutil.copy(copied / "stage2/model/model.safetensors", copied / "stage1/model/model.safetensors")
    with pytest.raises(UserError, match="other inputs"):
        main(arguments("stage2", copied))


@pytest.mark.parametrize(("phase", "needs"), [("stage2", "make stage1"), ("um3", "make stage2")])
def test_a_missing_earlier_phase_is_named(phase: str, needs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=needs):
        main(arguments(phase, tmp_path))


def test_um3_without_codes_names_the_phase(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make codes"):
        train_here("um3", made, tmp_path / "um3", f"data.codes={tmp_path}/none")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-00000002" / path.name, path)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run of six steps that was killed after the fifth: its command, and its checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed")
    command = [*long_run("stage1", folder, steps=6), "loop.keep_checkpoints=2", 'loop.keep_best_by=""']
    with pytest.MonkeyPatch.context() as patch:
        kill([*command, f"loop.output_dir={folder}/run"], 5, patch)
    return command, folder / "run"


@pytest.fixture
def stopped(killed_once: tuple[list[str], Path], tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of `killed_once` to damage: its command, and the folder of its checkpoints."""
    command, folder = killed_once
    shutil.copytree(folder, tmp_path / "run")
    return [*command, f"loop.output_dir={tmp_path}/run"], tmp_path / "run/checkpoints"


@pytest.mark.parametrize("damage", [flip, cut, swap, Path.unlink])
@pytest.mark.parametrize("file", ["model-00000.safetensors", "meta.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(
    file: str, damage: Callable[[Path], None], stopped: tuple[list[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = stopped
    damage(folder / "step-00000004" / file)
    with caplog.at_level("WARNING"):
        assert checkpoint.find_checkpoint(folder) == folder / "step-00000002"
    assert f"step-00000004 is damaged ({file})" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.damaged"]


def test_from_the_previous_checkpoint_the_run_computes_the_same_bits(
    stopped: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, folder = stopped
    main([*command, f"loop.output_dir={tmp_path}/whole"])
    flip(folder / "step-00000004/model-00000.safetensors")
    (folder / "step-00000006.partial").mkdir()  # as after a kill during a save
    main(command)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_without_a_valid_checkpoint_nothing_is_overwritten(stopped: tuple[list[str], Path], tmp_path: Path) -> None:
    command, folder = stopped
    flip(folder / "step-00000002/model-00000.safetensors")
    (folder / "step-00000004/meta.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match=r"step-00000004: meta.json; step-00000002: model-0"):
        main(command)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_an_unfinished_first_checkpoint_does_not_count(stopped: tuple[list[str], Path], tmp_path: Path) -> None:
    command, folder = stopped
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000004").rename(folder / "step-00000002.partial")
    main(command)
    assert logged(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("best_by", "kept"), [("train/loss", [3, 7, 8]), ('""', [7, 8])])
def test_the_newest_checkpoints_and_the_best_are_kept(
    best_by: str, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._train_step

    def with_its_lowest_loss_at_step_3(task: loop.Task, **options: Any) -> dict[str, float]:
        return real(task, **options) | {"train/loss": float(abs(options["step"] + 1 - 3))}

    monkeypatch.setattr(loop, "_train_step", with_its_lowest_loss_at_step_3)
    options = ["loop.max_steps=8", "loop.save_every_steps=1", f"loop.keep_best_by={best_by}"]
    train_here("stage1", tmp_path, tmp_path, *options)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in kept]
    if best_by == "train/loss":
        means = checkpoint.read_meta(tmp_path / "checkpoints/step-00000003")["state"]["means"]
        assert means == {"train/loss": 0.0}


def test_an_unknown_metric_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here("stage1", tmp_path, tmp_path, "loop.keep_best_by=train/los", "loop.max_steps=1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "keep_best_by" in line]
    assert "'train/los'" in line and "train/loss" in line


def test_a_non_finite_loss_loses_nothing_and_its_remedy_works(stopped: tuple[list[str], Path], tmp_path: Path) -> None:
    command, folder = stopped
    shutil.copytree(folder, tmp_path / "hot/checkpoints")
    hot = [*command, f"loop.output_dir={tmp_path}/hot", "optimizer.lr=1e30", "loop.save_every_steps=1"]
    with pytest.raises(UserError, match=r"^step 6: .*train/mse is (nan|inf).* on rank 0: images of scenes: .*RUN="):
        main(hot)
    kept = sorted(path.name for path in (tmp_path / "hot/checkpoints").iterdir())
    assert kept[-1] == "step-00000005" and "step-00000004" in kept
    assert logged(tmp_path / "hot", "step") == [5]
    # The remedy: another folder, a copy of the checkpoints, a lower rate.
    shutil.rmtree(tmp_path / "hot/checkpoints/step-00000005")
    shutil.copytree(tmp_path / "hot/checkpoints", tmp_path / "cool/checkpoints")
    main([*command, f"loop.output_dir={tmp_path}/cool"])
    main(command)
    assert outcome(tmp_path / "cool")["model"] == outcome(tmp_path / "run")["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["vocabulary.text_vocab_size=300"], "text vocabulary"),
        (
            ["vocabulary.subtokens=3", "vocabulary.bits_per_subtoken=4"],
            r"step-00000002 holds '\S+' of shape \(448, 32\), .* \(368, 32\)",
        ),
    ],
)
def test_a_checkpoint_of_another_vocabulary_is_refused(
    changes: list[str], message: str, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other/checkpoints"
    shutil.copytree(made / "um3/checkpoints", folder)
    shutil.rmtree(folder / "step-00000004")
    with pytest.raises(UserError, match=message):
        train_here("um3", made, tmp_path / "other", "data.seq_len=80", *changes)
    assert checkpoint.find_checkpoint(folder) == folder / "step-00000002"
    assert not (tmp_path / "other/done.json").exists()


def test_a_run_does_not_resume_with_other_inputs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "stage1/model", tmp_path / "stage1")
    flip(tmp_path / "stage1/model.safetensors")
    command = arguments("stage2", made, f"loop.output_dir={tmp_path}/stage2")
    kill(command, 3, monkeypatch)
    with pytest.raises(UserError, match=r"step-00000002 was trained from other inputs \({'init_from': "):
        main([*command, f"init_from={tmp_path}/stage1"])


def test_sigterm_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._train_step

    def train_step(task: loop.Task, **options: Any) -> dict[str, float]:
        if options["step"] == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(task, **options)

    monkeypatch.setattr(loop, "_train_step", train_step)
    with pytest.raises((Interrupted, SystemExit)):
        train_here("stage1", tmp_path, tmp_path)
    assert (tmp_path / "checkpoints/step-00000003/meta.json").exists() and not (tmp_path / "done.json").exists()
