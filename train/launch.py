"""Several training processes on this machine: one command, one set of messages, one exit code.

Across machines use `torchrun` with the same arguments; a process that finds its rank in the environment
launches nothing.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from um3.core.distributed import free_port

GRACE_S = 60.0
"""How long the other processes may take to leave once one has failed."""


def is_worker() -> bool:
    """True in a process that a launcher started."""
    return "RANK" in os.environ


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m train ARGUMENTS` in `processes` processes; returns the first exit code that is not 0.

    SIGTERM and Ctrl-C are passed on, once, so that every process stops after the same step. When one process
    fails the others are stopped: they would wait for it for ever.
    """
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # the terminal's Ctrl-C must reach them through this process only
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while (codes := [worker.poll() for worker in workers]).count(None) and not any(codes):
        time.sleep(0.1)
    _stop(workers)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop what still runs: first politely, then not."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in running:
        try:
            worker.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
