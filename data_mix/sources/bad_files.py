"""What a source cannot use: unreadable files, each retried and then skipped, and the counts of other reasons."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from data_mix.retry import retry
from data_mix.samples import BadSample
from um3.core.errors import UserError
from um3.core.text import printable

logger = logging.getLogger(__name__)

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
