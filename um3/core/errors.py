"""One-line errors: what went wrong, where, and what to do about it."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line and names the remedy; no traceback is shown."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


class Terminated(BaseException):
    """SIGTERM outside the training loop: unwinds like Ctrl-C, so that partial files are removed."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn failures that the user can fix into one line and an exit code.

    Exit codes: 0 success (also after a SIGTERM that saved its state), 2 a user's mistake or a full disk,
    130 Ctrl-C, 143 SIGTERM. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", code=EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _leave("interrupted: no partial files were kept; run the same command to resume", code=EXIT_INTERRUPTED)
    except Terminated:
        _leave("terminated: no partial files were kept; run the same command to resume", code=EXIT_TERMINATED)
    except Exception as error:
        if not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        _leave(f"error: the disk is full{where}; free space and run the same command to resume", code=EXIT_USER_ERROR)


def is_disk_full(error: Exception) -> bool:
    """True for a full disk or quota, also if only the text says so, as in errors of safetensors and tokenizers."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _leave(message: str, *, code: int) -> None:
    # From here on a launcher's SIGTERM ends this process silently.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if int(os.environ.get("RANK", "0")) > 0:
        # Ranks mostly fail alike: rank 0 prints the message, and the launcher stops the others before they repeat it.
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Other ranks may wait in a collective. An orderly exit would wait for them forever; an exit without teardown
        # lets the launcher see the exit code and stop them.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
