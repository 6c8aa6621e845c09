"""Progress of long work: done, rate, time left, memory; a live line on a terminal, sparse lines in a log."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from um3.core.distributed import is_main

ItemT = TypeVar("ItemT")
LOG_EVERY_S = 10.0
LIVE_EVERY_S = 0.2


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB."""
    try:
        # What getrusage tells on Linux begins with the memory of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_gpu_memory_gib() -> float | None:
    """Most memory that torch has had on this process's GPU, in GiB; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return float(torch.cuda.max_memory_allocated() / 2**30)


def format_seconds(seconds: float) -> str:
    """`75.2` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Loops within show nothing: for steps of a longer loop that shows its own progress."""
    Progress.quiet += 1
    try:
        yield
    finally:
        Progress.quiet -= 1


class Progress:
    """Shows how far a loop of `total` items is; silent on every rank but the first.

    `start` is the number of items already done when the loop begins (a resumed run): it counts towards
    the share done, not towards the rate.
    """

    quiet = 0

    def __init__(self, total: int, *, label: str, unit: str = "it", start: int = 0):
        self.total, self.label, self.unit = total, label, unit
        self.done = self.first = start
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self.note = ""
        self.shows = not Progress.quiet

    def rate(self) -> float:
        """Items per second since the loop began."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """Count `count` more items; `note` (such as the current loss) is shown beside the figures."""
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        last = self.done >= self.total
        if self.shows and is_main() and (last or now - self.shown > (LIVE_EVERY_S if self.live else LOG_EVERY_S)):
            self.shown = now
            self._show(last=last)

    def _show(self, *, last: bool) -> None:
        rate = self.rate()
        elapsed = format_seconds(time.monotonic() - self.began)
        left = f"took {elapsed}" if last else f"{format_seconds((self.total - self.done) / max(rate, 1e-9))} left"
        line = (
            f"{self.label} {self.done}/{self.total} · {rate:.3g} {self.unit}/s · {left} · {peak_memory_gib():.2f} GiB"
        )
        line += f" · {self.note}" if self.note else ""
        start, end = ("\r\x1b[K", "\n" if last else "") if self.live else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)


def track(items: Iterable[ItemT], *, total: int, label: str, unit: str = "it") -> Iterator[ItemT]:
    """Iterate over `items` and show the progress."""
    progress = Progress(total, label=label, unit=unit)
    for item in items:
        yield item
        progress.advance()
