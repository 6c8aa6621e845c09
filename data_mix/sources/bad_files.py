"""What a source cannot use: unreadable files, which are retried and then skipped, and counts of other reasons."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from data_mix.samples import BadSample
from um3.core.errors import UserError
from um3.core.text import printable

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (0.5, 2.0, 8.0)  # before each retry; a file server that recovers does so within seconds
UNREADABLE = "unreadable file"  # the reason of every sample of a skipped file
DAMAGED = "damaged, used up to the damage"  # the reason of a file in `BadFiles.counts`

ResultT = TypeVar("ResultT")


class DamagedFile(UserError):
    """The content of a file is not what it should be; the message is one line with the remedy."""


class BadFiles:
    """What one source does not use. skip: false makes the first unreadable file or record an error.

    reasons: why each file is skipped; every process finds them again, so a file that became readable is used by the
    next one. counts: number and first example of every other reason.
    """

    def __init__(self, source: str, *, skip: bool = True) -> None:
        self.source, self.skip = source, skip
        self.reasons: dict[Path, str] = {}
        self.counts: dict[str, tuple[int, str]] = {}

    def read(self, file: Path, action: Callable[[], ResultT]) -> ResultT:
        """Return `action()`, which reads `file`, or raise BadSample if it failed now or earlier.

        An error of the system (an OSError with a number) gets all retries, wrong content gets one.
        """
        if file not in self.reasons:
            try:
                return retry(action, where=f"source '{self.source}'", is_worth_it=_is_worth_a_retry)
            except (OSError, DamagedFile, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                self.add(file, reason if file.name in reason else f"{file}: {reason}")
        raise BadSample(UNREADABLE, detail=self.reasons[file])

    def read_part(self, file: Path, offset: int, size: int) -> bytes:
        """The `size` bytes of `file` from `offset` on, or BadSample, as from `read`."""

        def action() -> bytes:
            with file.open("rb") as opened:
                opened.seek(offset)
                return opened.read(size)

        return self.read(file, action)

    def read_all(self, files: Sequence[Path], action: Callable[[Path], ResultT]) -> Iterator[tuple[Path, ResultT]]:
        """Each file that can be read, and `action(file)`; UserError at the end if there is none."""
        for file in files:
            with contextlib.suppress(BadSample):
                yield file, self.read(file, functools.partial(action, file))
        if self.reasons.keys() >= set(files):
            some = "" if len(files) == 1 else f"any of its {len(files)} files, such as "
            raise UserError(f"source '{self.source}': cannot read {some}{self.reasons[files[0]]}")

    def add(self, file: Path, reason: str) -> None:
        """Skip `file` from now on, with a warning; UserError where `skip` is false."""
        self._check_skip(reason)
        self.reasons[file] = reason
        logger.warning("source '%s': skipping the samples of an unreadable file: %s", self.source, printable(reason))

    def skip_record(self, reason: str, where: str) -> None:
        """Count a record that cannot be used; UserError where `skip` is false."""
        self._check_skip(f"{where}: {reason}")
        self.count(reason, where)

    def _check_skip(self, problem: str) -> None:
        if not self.skip:
            raise UserError(f"source '{self.source}': {problem}; repair it, or set skip_bad_files=true")

    def count(self, reason: str, where: str, *, number: int = 1) -> None:
        """Add `number` to the count of a reason, which is a short fixed phrase; `where` is an example."""
        before, example = self.counts.get(reason, (0, where))
        self.counts[reason] = (before + number, example)

    def summary(self) -> str:
        """Every reason with its count and first example; empty if there is none."""
        return printable("; ".join(f"{reason}: {n} (such as {where})" for reason, (n, where) in self.counts.items()))

    def report(self, num_samples: int) -> None:
        """Log one line for a source that was opened, unless all that it found is used."""
        if self.counts:
            logger.warning("source '%s': %d samples; %s", self.source, num_samples, self.summary())


def _is_worth_a_retry(error: Exception, num_retries: int) -> bool:
    is_of_system = isinstance(error, OSError) and error.errno is not None
    return is_of_system or (num_retries == 0 and isinstance(error, OSError | DamagedFile | pa.ArrowException))


def retry(
    action: Callable[[], ResultT], *, where: str, is_worth_it: Callable[[Exception, int], bool] = lambda *_: True
) -> ResultT:
    """Return `action()`. After an exception, wait and call it again, at most once for each of RETRY_WAITS_S.

    where: what is read, for the log. is_worth_it: whether to retry after an exception, given the number of retries so
    far. The exception of the last call is raised.
    """
    for num_retries, wait_s in enumerate(RETRY_WAITS_S):
        try:
            return action()
        except Exception as error:
            if not is_worth_it(error, num_retries):
                raise
            logger.info("%s: trying again in %g s: %s", where, wait_s, one_line(error))
            time.sleep(wait_s)
    return action()


def one_line(error: Exception) -> str:
    """Type and message of an exception, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
