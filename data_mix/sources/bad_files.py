"""Files that cannot be read: each is retried, then skipped for the rest of the process and its samples counted."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from data_mix.retry import retry
from data_mix.samples import BadSample
from um3.core.errors import UserError

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable file"  # the reason of every sample of a skipped file

ResultT = TypeVar("ResultT")


class DamagedFile(UserError):
    """The content of a file is not what it should be; the message is one line with the remedy."""


class BadFiles:
    """The files of one source that could not be read, with the reason of each.

    The list is not saved: every process finds it again, and a file that became readable is used by the next process.
    """

    def __init__(self, source: str, *, skip: bool = True) -> None:
        """`skip`: false makes the first unreadable file an error (`skip_bad_files` of a source)."""
        self.source, self.skip = source, skip
        self.reasons: dict[Path, str] = {}

    def read(self, file: Path, action: Callable[[], ResultT]) -> ResultT:
        """Return `action()`, which reads `file`; retry it after an error.

        An error of the system (an OSError with a number) gets all retries, wrong content gets one. BadSample if it
        failed now or earlier; UserError if it failed and `skip` is false.
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
        if not self.skip:
            raise UserError(f"source '{self.source}': {reason}; repair the file, or set skip_bad_files=true")
        self.reasons[file] = reason
        logger.warning("source '%s': skipping the samples of an unreadable file: %s", self.source, reason)


def _is_worth_a_retry(error: Exception, num_retries: int) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return isinstance(error, OSError | DamagedFile | pa.ArrowException) and num_retries == 0
