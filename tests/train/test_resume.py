"""Runs that are stopped, killed, damaged or asked for twice."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import ROOT, arguments, environment, losses, run_apart, run_here
from train import checkpoint, loop
from um3.core.errors import Interrupted, UserError
from um3.core.metrics import read_metrics

PHASES = ["stage1", "stage2", "um3"]


class Killed(Exception):
    """Stands for a kill between two steps."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = loop._guarded_step

    def guarded(task: loop.Task, *, step: int, limit: int = step) -> dict[str, float]:
        if step >= limit:
            raise Killed
        return real(task, step=step)

    monkeypatch.setattr(loop, "_guarded_step", guarded)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_resumes_to_the_same_bits(
    phase: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average = "optimizer.average_decay=0.9"
    run_here(monkeypatch, arguments(phase, made, f"loop.folder={tmp_path}/whole", average))
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_here(patch, arguments(phase, made, f"loop.folder={tmp_path}/killed", average))
    run_here(monkeypatch, arguments(phase, made, f"loop.folder={tmp_path}/killed", average))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize(("kind", "zero_stage"), [("adamw", 0), ("adamw", 2), ("adamw", 3), ("muon", 0), ("muon", 2)])
def test_a_checkpoint_fits_any_zero_stage(
    kind: str, zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = f"optimizer.kind={kind}"
    run_here(monkeypatch, arguments("um3", made, f"loop.folder={tmp_path}/whole", optimizer))
    moved = arguments("um3", made, f"loop.folder={tmp_path}/moved", optimizer)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_here(patch, moved)
    run_here(monkeypatch, [*moved, f"engine.zero_stage={zero_stage}"])
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_from_one_process_to_two(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.folder={tmp_path}/whole"))
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_here(patch, arguments("um3", made, f"loop.folder={tmp_path}/moved"))
    result = run_apart(arguments("um3", made, f"loop.folder={tmp_path}/moved"), processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_within_a_step(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = arguments("stage1", tmp_path, "loop.total_steps=100000", "loop.save_every_steps=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *command],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "stage1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and len(read_metrics(metrics)) < 3:
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr and f"stopped by {number.name}" in stderr
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert json.loads((saved / "meta.json").read_text())["step"] == read_metrics(metrics)[-1]["step"]


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
    command = arguments("um3", made, f"loop.folder={tmp_path}/um3", f"data.codes={tmp_path}/none")
    with pytest.raises(UserError, match="make codes"):
        run_here(monkeypatch, command)


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made / "stage1/checkpoints", folder)
    newest = sorted(folder.iterdir())[-1]
    file = newest / "model-00000.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    with caplog.at_level("WARNING"):
        found = checkpoint.find_checkpoint(folder)
    assert found == sorted(folder.iterdir())[-2]
    assert newest.name in caplog.text and "damaged" in caplog.text


def test_a_full_disk_during_a_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint.save_file, []

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        run_here(monkeypatch, arguments("stage1", tmp_path))
    names = [path.name for path in (tmp_path / "stage1/checkpoints").iterdir()]
    assert names == ["step-00000002"]


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"step 1: .*mse is (nan|inf).*scenes"):
        run_here(monkeypatch, arguments("stage1", tmp_path, "model.initializer_range=1.0e+30"))


def test_sigterm_inside_the_process_is_an_orderly_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._guarded_step

    def guarded(task: loop.Task, *, step: int) -> dict[str, float]:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(task, step=step)

    monkeypatch.setattr(loop, "_guarded_step", guarded)
    with pytest.raises((Interrupted, SystemExit)):
        run_here(monkeypatch, arguments("stage1", tmp_path))
    assert (tmp_path / "stage1/checkpoints/step-00000003/meta.json").exists()
    assert not (tmp_path / "stage1/done.json").exists()
