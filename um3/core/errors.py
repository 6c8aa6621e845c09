"""One-line errors: what went wrong, where, and what to do about it."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """A mistake the user can mend. Its message is one line and names the remedy; no traceback is shown."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has put everything in order first."""


class Terminated(BaseException):
    """SIGTERM outside the training loop: unwinds like Ctrl-C, so that half-written files are removed on the way."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn the failures a user can mend into one line and an exit code.

    Exit codes: 0 done (also after a SIGTERM that saved its state), 2 a user's mistake or a full disk,
    130 Ctrl-C, 143 SIGTERM. Anything else is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", code=EXIT_USER_ERROR)
    except (KeyboardInterrupt, Terminated) as stop:
        by_hand = isinstance(stop, KeyboardInterrupt)
        _leave(
            f"{'interrupted' if by_hand else 'terminated'}: nothing half-written was left behind; "
            "run the same command to go on",
            code=EXIT_INTERRUPTED if by_hand else EXIT_TERMINATED,
        )
    except Exception as error:
        if not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        _leave(
            f"error: the disk is full{where}; free some space and run the same command to go on", code=EXIT_USER_ERROR
        )


def is_disk_full(error: Exception) -> bool:
    """True for a full disk or quota, also as safetensors and tokenizers report it: in the text alone."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _leave(message: str, *, code: int) -> None:
    # From here on a launcher that stops this process ends it without another word.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if int(os.environ.get("RANK", "0")) > 0:
        # Ranks mostly fail alike: the first says it, and the launcher stops the others before they repeat it.
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The other ranks may be waiting in a collective: leaving without the usual teardown lets the
        # launcher see the exit code and stop them, where an orderly exit would wait for them forever.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
