"""Real runs that are killed, moved and starved of disk space: they compute what undisturbed runs compute."""

import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.survive import (
    PHASES,
    STEPS_PER_KILL,
    Run,
    compare,
    computed_metrics,
    killed_run,
    long_run,
    newest,
    outcome,
    random_moments,
    start,
    survive,
    whole_run,
)
from um3.core.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="inspects processes through Linux's /proc"),
]
KILLS = 7
"""In each phase; `make survive` does 20, with one process and with two."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_random_moments_computes_the_same_bits(phase, made, tmp_path):
    command = long_run(phase, made, steps=STEPS_PER_KILL * KILLS)
    survive(command, tmp_path, kills=KILLS, seed=PHASES.index(phase))


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """A run of two processes: command line, run folder, seconds to its first step."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    command = [*long_run("um3", made, steps=40), "engine.zero_stage=2"]
    return command, folder, whole_run(command, folder=folder, processes=2)


def test_two_killed_processes_compute_the_same_bits(undisturbed, tmp_path):
    command, whole, start_s = undisturbed
    moments = random_moments(3, seed=0)
    killed_run(command, folder=tmp_path / "killed", moments=moments, start_s=start_s, processes=2)
    compare(whole, tmp_path / "killed")


def test_a_run_moves_from_two_processes_to_one_and_back(undisturbed, tmp_path):
    """SIGTERM ends each part within a step, with exit code 0."""
    (command, whole, _), moved = undisturbed, tmp_path / "moved"
    for processes, steps in ((2, 8), (1, 20)):
        run = start(command, folder=moved, processes=processes)
        run.wait_until(lambda: logged_steps(moved) >= steps)  # noqa: B023 (called at once)
        end_within_a_step(run, moved, number=signal.SIGTERM, code=0)
    start(command, folder=moved, processes=2).finish()
    before, after = computed_metrics(whole), computed_metrics(moved)
    # The counts of tasks and targets are whole numbers that show which samples a batch holds.
    assert [counts(row) for row in after] == [counts(row) for row in before]
    assert len({tuple(counts(row).values()) for row in before}) > 10
    assert [row["train/loss"] for row in after] == pytest.approx([row["train/loss"] for row in before], rel=1e-5)


def test_ctrl_c_saves_within_a_step(tmp_path):
    folder = tmp_path / "run"
    run = start(long_run("stage1", tmp_path, steps=100_000), folder=folder)
    run.wait_until(lambda: logged_steps(folder) >= 3)
    end_within_a_step(run, folder, number=signal.SIGINT, code=130)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    command = [*long_run("stage1", tmp_path, steps=8), 'loop.keep_best_by=""']
    whole = tmp_path / "whole"
    whole_run(command, folder=whole, processes=1)
    checkpoint_bytes = sum(file.stat().st_size for file in (whole / "checkpoints/step-00000008").iterdir())
    with small_disk(4 * checkpoint_bytes) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(int(1.5 * checkpoint_bytes)))  # room for two and a half checkpoints
        folder = disk / "run"
        run = Run([*command, f"loop.output_dir={folder}"], log=tmp_path / "full.log")
        assert run.wait() == 2
        last = run.text().splitlines()[-1]
        assert "Traceback" not in run.text() and last.startswith("error: ") and "free space" in last, last
        assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
        filler.unlink()
        Run([*command, f"loop.output_dir={folder}"], log=tmp_path / "freed.log").finish()
        assert "step-00000004" in (tmp_path / "freed.log").read_text()
        assert outcome(folder) == outcome(whole)


@contextmanager
def small_disk(size):
    """A file system of `size` bytes, mounted in a namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    script = f"mount -t tmpfs -o size={size} tmpfs /mnt && echo mounted && exec sleep 600"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip("may not mount a file system")
            yield Path("/proc", str(holder.pid), "root", "mnt")
        finally:
            holder.kill()


def end_within_a_step(run, folder, *, number, code):
    """Send a signal in the middle of a step: the run saves that step or the next one, and ends."""
    run.pause()
    before = logged_steps(folder)
    run.send(number)
    run.unpause()
    assert run.wait() == code, run.text()[-2000:]
    after = logged_steps(folder)
    assert before <= newest(folder / "checkpoints") == after <= before + 1
    assert f"stopped by {number.name} after step {after};" in run.text() and "Traceback" not in run.text()


def logged_steps(folder):
    return len(read_metrics(folder / "metrics.jsonl"))


def counts(row):
    """Data metrics without the share of padding, which depends on the micro-batches."""
    return {name: value for name, value in row.items() if name.startswith("data/") and name != "data/padding"}
