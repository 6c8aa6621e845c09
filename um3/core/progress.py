"""Progress of long work: done, rate, time left, memory; a live line on a terminal, sparse lines in a log.

Not rich.progress: in a log it prints only its last line, and its rate includes the items of an earlier run.
"""

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from um3.core.distributed import is_main
from um3.core.text import printable

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
LOG_EVERY_S = 10.0
LIVE_EVERY_S = 0.2


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # On Linux getrusage starts at the memory of the parent process; /proc does not.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_gpu_memory_gib() -> float | None:
    """Peak memory that torch allocated on this process's GPU, in GiB; None without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() / 2**30 if torch and torch.cuda.is_available() else None


def format_seconds(seconds: float) -> str:
    """`75.2` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide the progress of inner loops; for the steps of a longer loop that shows its own."""
    Progress.quiet += 1
    try:
        yield
    finally:
        Progress.quiet -= 1


class Progress:
    """Shows the progress of a loop over `total` items, on rank 0 only.

    `start`: items that an earlier run finished; they count towards the share, not towards the rate.
    """

    quiet = 0

    def __init__(self, total: int, *, label: str, unit: str = "it", start: int = 0):
        self.total, self.label, self.unit = total, label, unit
        self.done = self.first = start
        self.began = self.shown = self.logged = time.monotonic()
        self.live = sys.stderr.isatty()
        self.note = ""
        self.shows = not Progress.quiet

    def rate(self) -> float:
        """Items per second since the loop began."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """Count `count` more items; `note` (such as the current loss) is shown after the figures."""
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        last = self.done >= self.total
        if not self.shows or not is_main():
            return
        if last or now - self.shown > (LIVE_EVERY_S if self.live else LOG_EVERY_S):
            self.shown = now
            start, end = ("\r\x1b[K", "\n" if last else "") if self.live else ("", "\n")
            print(start + self._line(last=last), end=end, file=sys.stderr, flush=True)
        if last or now - self.logged > LOG_EVERY_S:
            self.logged = now
            logger.debug("%s", self._line(last=last))  # for a log file

    def _line(self, *, last: bool) -> str:
        rate = self.rate()
        left_s = (self.total - self.done) / max(rate, 1e-9)
        left = f"took {format_seconds(time.monotonic() - self.began)}" if last else f"{format_seconds(left_s)} left"
        parts = [f"{self.label} {self.done}/{self.total}", f"{rate:.3g} {self.unit}/s", left]
        parts += [f"{peak_memory_gib():.2f} GiB", *([self.note] if self.note else [])]
        return printable(" · ".join(parts))


def batches(count: int, *, batch_size: int, label: str = "", unit: str = "it") -> Iterator[slice]:
    """0 .. count - 1 in slices of at most `batch_size`; a `label` shows the progress."""
    progress = Progress(count, label=label, unit=unit) if label else None
    for start in range(0, count, batch_size):
        end = min(start + batch_size, count)
        yield slice(start, end)
        if progress:
            progress.advance(end - start)


def track(items: Iterable[ItemT], *, total: int, label: str, unit: str = "it") -> Iterator[ItemT]:
    """Iterate over `items` and show the progress."""
    progress = Progress(total, label=label, unit=unit)
    for item in items:
        yield item
        progress.advance()
