"""Start several training processes on this machine: one command, one set of messages, one exit code.

Across machines use `torchrun` with the same arguments; a process that finds RANK in the environment launches nothing.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from um3.core.distributed import free_port
from um3.core.errors import EXIT_LOST_RANK, LAUNCHER

# Not torchrun (torch 2.13): after a SIGTERM that saved the run it exits with 1 and a traceback of 33 lines, a
# failed rank prints 110 lines, and its workers keep training when it is killed. Here: exit code 0, one line, no
# orphans. Both need 11.6 s to the first step.
POLL_S = 0.02
"""Short, so that the process that failed first is found before the failures it causes."""
SETTLE_S = 5.0
"""Time for the others to end after a process that lost them: the cause is one that fails, or one that does not end."""
PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process receives when its parent dies."""
Worker = subprocess.Popen[bytes]


def launch(arguments: Sequence[str], *, processes: int, timeout_s: float) -> int:
    """Run `python -m train ARGUMENTS` in `processes` processes; return the exit code of the first that failed, or 0.

    SIGTERM and Ctrl-C are forwarded, and stopped processes continued, so that all end after the same step; the third
    such signal kills them. If one process fails, or does not answer for `timeout_s`, the others are killed at once:
    they would wait for it forever, and the last checkpoint stays valid. One line then names the rank and the reason.
    If this process is killed, Linux kills the others.
    """
    received: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: received.append(number))
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), LAUNCHER: "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            env={"OMP_NUM_THREADS": "1", **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # the terminal's Ctrl-C must reach the workers through this process only
            preexec_fn=_die_with_parent(),
        )
        for rank in range(processes)
    ]
    reason, code = _watch(workers, received=received, timeout_s=timeout_s)
    _send(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()
    if reason:
        remedy = "Run the same command to resume from the last checkpoint"
        print(f"error: {reason}; all {processes} processes were stopped. {remedy}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def _watch(workers: Sequence[Worker], *, received: list[int], timeout_s: float) -> tuple[str, int]:
    """Forward signals until all ended, one failed, one did not answer, or the user insists: (reason, exit code).

    The reason is empty for success, and if a process has printed it. A rank that was stopped (SIGSTOP) is seen from
    here. If one hangs, the others' collectives time out, and they exit with EXIT_LOST_RANK while it stays.
    """
    num_forwarded, deadline = 0, math.inf
    answered = dict.fromkeys(range(len(workers)), time.monotonic())
    while True:
        now, codes = time.monotonic(), [worker.poll() for worker in workers]
        # Signals sort first: a rank that exited with an error may have lost its connection to a killed one.
        failed = [(code > 0, rank, code) for rank, code in enumerate(codes) if code not in (None, 0, EXIT_LOST_RANK)]
        if failed:
            _, rank, code = min(failed)
            return f"rank {rank} {_reason(code)}" if -code not in received and code < 2 else "", code
        alive = [rank for rank, code in enumerate(codes) if code is None]
        if not alive:
            return ("the processes lost each other", EXIT_LOST_RANK) if EXIT_LOST_RANK in codes else ("", 0)
        answered |= {rank: now for rank in alive if not _is_stopped(workers[rank].pid)}
        deadline = min(deadline, now + SETTLE_S) if EXIT_LOST_RANK in codes else deadline
        if silent := [rank for rank in alive if now > deadline or now - answered[rank] > timeout_s]:
            return f"rank {', '.join(map(str, silent))} did not answer for {timeout_s:g} s", EXIT_LOST_RANK
        if len(received) > 2:
            return "", -received[0]
        for number in received[num_forwarded:]:
            _send(workers, number)
            _send(workers, signal.SIGCONT)
        num_forwarded = len(received)
        time.sleep(POLL_S)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:  # it has just ended, or this is not Linux
        return False


def _die_with_parent() -> Callable[[], object] | None:
    """A function for the new process to call first, which ends it when this process dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _reason(code: int) -> str:
    if code > 0:
        return "failed (see above)"
    return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
