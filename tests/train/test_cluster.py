"""Other launchers: the Slurm script with torchrun, DeepSpeed's, accelerate's. Each runs a single machine's command."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.conftest import ROOT, arguments, environment, losses, train_apart
from um3.core.distributed import free_port
from um3.core.metrics import read_metrics

pytestmark = pytest.mark.slow

# Stand-ins for Slurm's commands that the script uses, on one machine.
SLURM = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; echo $$ >"$SPOOL/0.pid"; exec "$@"',
    "scancel": '[ "$1" = --signal=TERM ] && [ "$2" = 7.0 ] && kill -TERM "$(cat "$SPOOL/0.pid")"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; echo elsewhere; else echo "$@" >"$SPOOL/requeued"; fi',
}


def submit(spool, command):
    """Run the script as Slurm would run it for job 7 on one node."""
    for name, body in SLURM.items():
        (spool / name).write_text(f"#!/bin/sh\n{body}\n")
        (spool / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SPOOL": str(spool)}
    settings = {"PATH": f"{spool}:{os.environ['PATH']}", "PYTHON": sys.executable, "NPROC": "2"}
    settings |= slurm | {"PORT": str(free_port())}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts/um3.sbatch"), *command],
        cwd=ROOT, env=environment() | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_slurm_job_saves_and_requeues_before_its_time_is_up(tmp_path):
    long = ["loop.max_steps=100000", "loop.save_every_steps=100000"]
    job = submit(tmp_path, arguments("stage1", tmp_path, *long))
    deadline = time.monotonic() + 200
    while job.poll() is None and len(read_metrics(tmp_path / "stage1/metrics.jsonl")) < 3:
        assert time.monotonic() < deadline, "did not reach step 3"
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 0, stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (saved,) = (tmp_path / "stage1/checkpoints").glob("step-*")
    assert (saved / "meta.json").exists()


def test_a_failed_slurm_job_is_not_requeued(tmp_path):
    job = submit(tmp_path, arguments("stage1", tmp_path, "loop.batch_size=9"))
    _, stderr = job.communicate(timeout=200)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert job.returncode != 0 and len(errors) == 1 and "batch_size" in errors[0]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    "launcher",
    [
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT", "-m"],
    ],
    ids=["deepspeed", "accelerate"],
)
def test_other_launchers_run_the_same_command(launcher, tmp_path):
    launcher = [str(free_port()) if word == "PORT" else word for word in launcher]
    passed = "engine.deepspeed={zero_optimization: {overlap_comm: false}}"
    train_apart(arguments("stage1", tmp_path, "engine.zero_stage=1", passed), launcher=["-m", *launcher, "train"])
    assert len(losses(tmp_path / "stage1")) == 4
    assert ": 2 x cpu;" in (tmp_path / "stage1/train.log").read_text()
