"""Several processes started by `python -m train --processes N`: one set of messages, one exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.conftest import ROOT, arguments, environment, losses, run_here
from um3.core.metrics import read_metrics

pytestmark = pytest.mark.slow


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *command, "--processes", "2"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(folder: Path, *, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(folder / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"never reached step {steps}: {process.communicate()[1][-2000:]}")


def test_two_processes_train_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(arguments("stage1", tmp_path / "two"))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    run_here(monkeypatch, arguments("stage1", tmp_path / "one"))
    assert losses(tmp_path / "two/stage1") == pytest.approx(losses(tmp_path / "one/stage1"), rel=5e-3)
    assert json.loads((tmp_path / "two/stage1/done.json").read_text())["processes"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_all_after_the_same_step(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start(arguments("stage1", tmp_path, "loop.total_steps=100000", "loop.save_every_steps=100000"))
    wait_for_steps(tmp_path / "stage1", steps=3, process=process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr and stderr.count("stopped by") == 1
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert (saved / "meta.json").exists()


def test_one_dead_process_stops_the_others(tmp_path: Path) -> None:
    process = start(arguments("stage1", tmp_path, "loop.total_steps=100000", "loop.save_every_steps=100000"))
    wait_for_steps(tmp_path / "stage1", steps=3, process=process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list child processes")
    victim = [int(pid) for pid in children.read_text().split()][-1]
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_mistake_inside_the_processes_is_said_once(tmp_path: Path) -> None:
    process = start(arguments("stage1", tmp_path, "loop.batch_size=9"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("error:") == 1 and "Traceback" not in stderr
