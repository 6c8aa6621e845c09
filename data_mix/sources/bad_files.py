"""Files that cannot be read: tried again, then set aside by name for the rest of the process and counted."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from data_mix.samples import BadSample
from um3.core.errors import UserError

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (0.5, 2.0, 8.0)  # a file server's hiccup passes in seconds; what lasts longer is named and left out
SET_ASIDE = "shard set aside"

ReadT = TypeVar("ReadT")


class DamagedFile(UserError):
    """What a file holds is not what it should; its message is one line with the remedy, like any UserError's."""


class SetAside:
    """The files of one source that could not be read, with the reason.

    Which they are is found anew by every process: with the order of the samples it says what is read instead, so
    nothing of it has to be saved, and a file that can be read again is used again by the next process.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.reasons: dict[Path, str] = {}

    def read(self, file: Path, action: Callable[[], ReadT]) -> ReadT:
        """`action()`, which reads `file`; after an error it waits and tries again.

        What the file holds wrongly gets one more try, what the system reports (an OSError with a number) all of them.

        Raises:
            BadSample: "shard set aside", because it failed now or earlier.
        """
        for number in range(len(RETRY_WAITS_S) + 1):
            if file in self.reasons:
                break
            try:
                return action()
            except (OSError, DamagedFile, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                reason = reason if file.name in reason else f"{file}: {reason}"
                is_the_systems = isinstance(error, OSError) and error.errno is not None
                if number < (len(RETRY_WAITS_S) if is_the_systems else 1):
                    logger.info("source '%s': trying again in %g s: %s", self.source, RETRY_WAITS_S[number], reason)
                    time.sleep(RETRY_WAITS_S[number])
                else:
                    self.reasons[file] = reason
                    logger.warning("source '%s': set aside, others stand in for its samples: %s", self.source, reason)
        raise BadSample(SET_ASIDE, detail=self.reasons[file])
