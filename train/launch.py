"""Several training processes on this machine: one command, one set of messages, one exit code.

Across machines use `torchrun` with the same arguments; a process that finds its rank in the environment
launches nothing.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from um3.core.distributed import free_port

POLL_S = 0.02
"""Short, so that of several processes the one that failed first is seen first."""
PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): the signal a process gets when the one that started it dies."""


def is_worker() -> bool:
    """True in a process that a launcher started."""
    return "RANK" in os.environ


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m train ARGUMENTS` in `processes` processes; returns the exit code of the first that failed, or 0.

    SIGTERM and Ctrl-C are passed on, once, so that every process stops after the same step. When one process
    fails the others are killed at once: they wait for it in vain, and the last checkpoint stays whole whatever they
    do. The last line says which it was and how it ended. No process outlives this one.
    """
    asked: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: asked.append(number))
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # the terminal's Ctrl-C must reach them through this process only
            preexec_fn=_die_together(),
        )
        for rank in range(processes)
    ]
    passed_on = 0
    while (codes := [worker.poll() for worker in workers]).count(None) and not any(codes):
        for number in asked[passed_on:]:
            _send(workers, number)
        passed_on = len(asked)
        time.sleep(POLL_S)
    _send(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()
    # A signal goes first: the others may have found their connection closed by then.
    failed = sorted((code > 0, rank, code) for rank, code in enumerate(codes) if code)
    if not failed:
        return 0
    _, rank, code = failed[0]
    if -code not in asked and (reason := _reason(code)):
        print(
            f"error: rank {rank} {reason}, so all {processes} processes were stopped; run the same command to go on "
            "from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    return code if code > 0 else 128 - code


def _die_together() -> Callable[[], object] | None:
    """What a new process does first so that it ends with this one, were it killed: else it would train on unseen."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _reason(code: int) -> str:
    """How a process ended, where it could not say so itself."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return "failed (see above)" if code == 1 else ""


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
