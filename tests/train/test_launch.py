"""Several processes started by `python -m train --processes N`: one set of messages, one exit code.

SIGTERM to two processes, and SIGKILL to their launcher: tests/train/test_survival.py.
"""

import os
import resource
import signal
from pathlib import Path

import pytest

from tests.helpers.processes import run_on_ranks
from tests.helpers.survive import Run, process_state
from tests.train.conftest import arguments
from train.launch import launch
from train.loop import NonFiniteLoss, check_finite
from um3.core.distributed import rank
from um3.core.metrics import read_metrics

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="inspects processes through Linux's /proc")


DEAF = "signal.signal(15, signal.SIG_IGN)"


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        (["time.sleep(60)", "sys.exit(1)"], 1, "error: rank 1 failed (see above)"),
        (["sys.exit(124)", "os.kill(os.getpid(), 9)"], 137, "error: rank 1 was killed by SIGKILL"),
        (["sys.exit(124)", "time.sleep(0.2) or sys.exit(2)"], 2, ""),  # it has printed its mistake
        (["sys.exit(124)", "time.sleep(60)"], 124, "error: rank 1 did not answer for 3 s"),
        (["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"], 124, "error: rank 1 did not answer for 3 s"),
        (["sys.exit(124)", "sys.exit(124)"], 124, "error: the processes lost each other"),
        (["sys.exit(0)", "sys.exit(0)"], 0, ""),
        ([f"{DEAF}; [os.kill(os.getppid(), 15) or time.sleep(0.2) for _ in range(3)]; time.sleep(60)", DEAF], 143, ""),
    ],
)
def test_the_cause_of_a_failure_is_named_once(ends, code, line, tmp_path, monkeypatch, capfd):
    """Stand-in workers instead of training."""
    program = "\n".join(f"if os.environ['RANK'] == '{rank}': {end}" for rank, end in enumerate(ends))
    (tmp_path / "train.py").write_text(f"import os, signal, sys, time\n{program}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("train.launch.SETTLE_S", 1.0)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert launch(["stage1"], processes=2, timeout_s=3) == code
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(line) and all(printed.startswith(line) for printed in lines)


def endless(folder, *, timeout_s=60):
    """Two processes that train until they are stopped, after their first steps."""
    options = ["loop.max_steps=100000", "loop.save_every_steps=100000", f"engine.timeout_s={timeout_s}"]
    run = Run(arguments("stage1", folder, *options), log=folder / "log", processes=2)
    run.wait_until(lambda: len(read_metrics(folder / "stage1/metrics.jsonl")) >= 3)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "is_paused", "code"), [(signal.SIGINT, False, 130), (signal.SIGTERM, True, 0)])
def test_a_signal_stops_all_after_the_same_step(number, is_paused, code, tmp_path):
    run = endless(tmp_path)
    if is_paused:
        run.pause()
    run.send(number)
    assert run.wait() == code, run.text()
    assert "Traceback" not in run.text() and run.text().count("stopped by") == 1
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert (saved / "meta.json").exists()


def kill(run):
    os.kill(run.workers()[1], signal.SIGKILL)


def kill_while_another_hangs(run):
    run.pause()
    kill(run)


def starve(run):
    """No more memory for the second process: its next larger tensor raises an exception."""
    resource.prlimit(run.workers()[1], resource.RLIMIT_AS, (2**26, 2**26))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "code", "reason"),
    [
        (kill, 137, "rank 1 was killed by SIGKILL"),
        (kill_while_another_hangs, 137, "rank 1 was killed by SIGKILL"),
        (Run.pause, 124, "rank 0 did not answer for 5 s"),
        (starve, 2, "Cannot allocate memory; use smaller batches"),
    ],
)
def test_one_dead_process_stops_all_with_its_reason(harm, code, reason, tmp_path):
    run = endless(tmp_path, timeout_s=5)
    workers = run.workers()
    harm(run)
    assert run.wait() == code
    assert run.text().splitlines()[-1].startswith(f"error: {reason}")
    assert "Traceback" not in run.text() and run.text().count("error: ") == 1
    assert [process_state(worker) for worker in workers] == ["", ""]


@pytest.mark.slow
def test_a_mistake_found_by_the_processes_is_printed_once(tmp_path):
    run = Run(arguments("stage1", tmp_path, "loop.batch_size=9"), log=tmp_path / "log", processes=2)
    assert run.wait() == 2
    assert run.text().count("error:") == 1 and "Traceback" not in run.text()


def message_of_a_bad_loss():
    try:
        check_finite({"mse": float("nan") if rank() == 1 else 1.0, "entropy": 2.0}, source="images of scenes")
    except NonFiniteLoss as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_every_rank_knows_which_rank_has_the_bad_loss(tmp_path):
    assert run_on_ranks(message_of_a_bad_loss, folder=tmp_path) == ["mse is nan on rank 1: images of scenes"] * 2
