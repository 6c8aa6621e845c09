"""Several processes started by `python -m train --processes N`: one set of messages, one exit code.

SIGTERM to two processes, and SIGKILL to their launcher: tests/train/test_survival.py.
"""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.processes import run_on_ranks
from tests.helpers.survive import Run, process_state
from tests.train.conftest import arguments, losses
from train.launch import launch
from train.loop import NonFiniteLoss, check_finite
from um3.core.distributed import rank
from um3.core.files import read_json
from um3.core.metrics import read_metrics

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="inspects processes through Linux's /proc")


def test_one_failed_process_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stand-in workers instead of training: rank 1 fails, rank 0 would sleep for a minute."""
    stand_in = "import os, sys, time\nsys.exit(1) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    (tmp_path / "train.py").write_text(stand_in)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert launch(["stage1"], processes=2) == 1
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: rank 1 failed")


def endless(folder: Path) -> Run:
    """Two processes that train until they are stopped, after their first steps."""
    options = ["loop.max_steps=100000", "loop.save_every_steps=100000"]
    run = Run(arguments("stage1", folder, *options), log=folder / "log", processes=2)
    run.wait_until(lambda: len(read_metrics(folder / "stage1/metrics.jsonl")) >= 3)
    return run


@pytest.mark.slow
def test_two_processes_train_like_one(made: Path, tmp_path: Path) -> None:
    run = Run(arguments("stage1", tmp_path), log=tmp_path / "log", processes=2)
    assert run.wait() == 0, run.text()
    assert losses(tmp_path / "stage1") == pytest.approx(losses(made / "stage1"), rel=5e-3)
    assert read_json(tmp_path / "stage1/done.json")["processes"] == 2


@pytest.mark.slow
def test_ctrl_c_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run = endless(tmp_path)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "Traceback" not in run.text() and run.text().count("stopped by") == 1
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert (saved / "meta.json").exists()


def kill(run: Run) -> None:
    os.kill(run.workers()[1], signal.SIGKILL)


def kill_while_another_hangs(run: Run) -> None:
    run.pause()
    kill(run)


def starve(run: Run) -> None:
    """No more memory for the second process: its next larger tensor raises an exception."""
    resource.prlimit(run.workers()[1], resource.RLIMIT_AS, (2**26, 2**26))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "code", "reason"),
    [
        (kill, 137, "rank 1 was killed by SIGKILL"),
        (kill_while_another_hangs, 137, "rank 1 was killed by SIGKILL"),
        (starve, 1, "rank 1 failed (see above)"),
    ],
)
def test_one_dead_process_stops_all_with_its_reason(
    harm: Callable[[Run], None], code: int, reason: str, tmp_path: Path
) -> None:
    run = endless(tmp_path)
    workers = run.workers()
    harm(run)
    assert run.wait() == code
    assert run.text().splitlines()[-1].startswith(f"error: {reason}")
    assert code != 1 or "allocate memory" in run.text()
    assert [process_state(worker) for worker in workers] == ["", ""]


@pytest.mark.slow
def test_a_mistake_found_by_the_processes_is_printed_once(tmp_path: Path) -> None:
    run = Run(arguments("stage1", tmp_path, "loop.batch_size=9"), log=tmp_path / "log", processes=2)
    assert run.wait() == 2
    assert run.text().count("error:") == 1 and "Traceback" not in run.text()


def message_of_a_bad_loss() -> str:
    try:
        check_finite({"mse": float("nan") if rank() == 1 else 1.0, "entropy": 2.0}, source="images of scenes")
    except NonFiniteLoss as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_every_rank_knows_which_rank_has_the_bad_loss(tmp_path: Path) -> None:
    assert run_on_ranks(message_of_a_bad_loss, folder=tmp_path) == ["mse is nan on rank 1: images of scenes"] * 2
