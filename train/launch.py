"""Start several training processes on this machine: one command, one set of messages, one exit code.

Across machines use `torchrun` with the same arguments; a process that finds RANK in the environment launches nothing.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from um3.core.distributed import free_port

# Not torchrun (torch 2.13): after a SIGTERM that saved the run it exits with 1 and a traceback of 33 lines, a
# failed rank prints 110 lines, and its workers keep training when it is killed. Here: exit code 0, one line, no
# orphans. Both need 11.6 s to the first step.
POLL_S = 0.02
"""Short, so that the process that failed first is found before the failures it causes."""
PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process receives when its parent dies."""


def is_worker() -> bool:
    """True in a process that a launcher started."""
    return "RANK" in os.environ


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m train ARGUMENTS` in `processes` processes; return the exit code of the first that failed, or 0.

    SIGTERM and Ctrl-C are forwarded once, so that all processes stop after the same step. If one process fails, the
    others are killed at once: they would wait for it forever, and the last checkpoint stays valid. One line then names
    the rank and the reason. If this process is killed, Linux kills the others.
    """
    received: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: received.append(number))
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # the terminal's Ctrl-C must reach the workers through this process only
            preexec_fn=_die_with_parent(),
        )
        for rank in range(processes)
    ]
    num_forwarded = 0
    while (codes := [worker.poll() for worker in workers]).count(None) and not any(codes):
        for number in received[num_forwarded:]:
            _send(workers, number)
        num_forwarded = len(received)
        time.sleep(POLL_S)
    _send(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()
    # Signals sort first: a rank that exited with an error may have lost its connection to a killed one.
    failed = sorted((code > 0, rank, code) for rank, code in enumerate(codes) if code)
    if not failed:
        return 0
    _, rank, code = failed[0]
    if -code not in received and (reason := _reason(code)):
        print(
            f"error: rank {rank} {reason}; all {processes} processes were stopped. Run the same command to resume from "
            "the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    return code if code > 0 else 128 - code


def _die_with_parent() -> Callable[[], object] | None:
    """A function for the new process to call first, which ends it when this process dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _reason(code: int) -> str:
    """How a process ended; empty if it printed the reason itself."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return "failed (see above)" if code == 1 else ""


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
