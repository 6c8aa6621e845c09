"""One-line errors: what went wrong, where, and what to do about it."""

import errno
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from um3.core.text import printable

EXIT_USER_ERROR = 2
EXIT_LOST_RANK = 124
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
LAUNCHER = "UM3_LAUNCHER"
"""Environment variable of processes whose launcher (`train.launch`) reports lost ranks."""
REMEDIES = {
    errno.EIO: "check the disk, then run the same command to resume",
    errno.ENOMEM: "use smaller batches, fewer processes or a machine with more memory",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space and run the same command to resume"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or choose another path"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EROFS), "choose another path"),
}
LOST_RANK = re.compile(r"(?is)gloo/transport|by peer|waiting for clients|NCCL.*(remote|time|abort)")
"""Errors of a collective that another rank did not finish."""
EXTRAS = {
    **dict.fromkeys(("lm_eval", "pycocoevalcap", "openpyxl", "matplotlib"), "eval"),
    **dict.fromkeys(("starlette", "uvicorn"), "web"),
    **dict.fromkeys(("tensorboard", "wandb"), "track"),
    **dict.fromkeys(("ftfy", "bs4"), "llamagen"),
}
"""Packages that only an extra of pyproject.toml installs."""
INPUTS = ("DATA", "TEXT", "VAL_FRACTION", "QLIP")
"""Variables that a command in a remedy repeats; a target that does not read one ignores it."""
MAKE_COMMAND = re.compile(r"(?<=run )make [a-z0-9-]+|(?<=`)make [a-z0-9-]+")
"""A command in a remedy, as in "run make codes first"."""


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line and names the remedy; no traceback is shown.

    `parameter` is the name of the argument at fault, for a form that shows the message beside it; empty if not known.
    """

    def __init__(self, message: object = "", *, parameter: str = ""):
        super().__init__(message)
        self.parameter = parameter


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; `code` is its exit code, 0 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, code: int = 0):
        super().__init__(code)
        self.code = code


class Terminated(BaseException):
    """SIGTERM outside the training loop: unwinds like Ctrl-C, so that partial files are removed."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn failures that the user can fix into one line and an exit code.

    A missing package of an extra is such a failure, wherever it is imported.

    0: success (also after a SIGTERM that saved its state). 2: a user's mistake, or a `system_problem`. 124: another
    rank ended or did not answer. 130: Ctrl-C. 143: SIGTERM. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        remedied = MAKE_COMMAND.sub(lambda match: make_command(match[0], also=INPUTS), str(error))
        _leave(f"error: {remedied}", code=EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _leave("interrupted: no partial files were kept; run the same command to resume", code=EXIT_INTERRUPTED)
    except Terminated:
        _leave("terminated: no partial files were kept; run the same command to resume", code=EXIT_TERMINATED)
    except ModuleNotFoundError as error:
        if not (problem := missing_extra(error.name)):
            raise
        _leave(f"error: {problem}", code=EXIT_USER_ERROR)
    except Exception as error:
        if _is_parallel() and isinstance(error, RuntimeError) and LOST_RANK.search(str(error)):
            reason = " ".join(str(error).split())[:160]
            remedy = "see the messages of the other ranks, and run the same command to resume from the last checkpoint"
            _leave(f"error: another rank ended or did not answer ({reason}); {remedy}", code=EXIT_LOST_RANK)
        if not (problem := system_problem(error)):
            raise
        _leave(f"error: {problem}", code=EXIT_USER_ERROR)


def make_command(command: str, *, also: Sequence[str] = ()) -> str:
    """`command`, such as "make um3", with the CONFIG, RUN and NPROC, and the variables `also`, that make was started
    with where they are not the Makefile's defaults; as it is in a process that make did not start."""
    values = os.environ if "MAKELEVEL" in os.environ else {}
    experiment = Path(values.get("CONFIG", "demo").replace(" ", "-")).name.removesuffix(".yaml")
    defaults = {"CONFIG": "demo", "RUN": f"runs/{experiment}"}
    defaults["QLIP"] = f"{values.get('RUN') or defaults['RUN']}/stage2/model"
    given = {name: values.get(name, "") for name in ("CONFIG", "RUN", "NPROC", *also)}
    shown = [f"{name}={shlex.quote(value)}" for name, value in given.items() if value not in ("", defaults.get(name))]
    return " ".join([command, *shown])


def missing_extra(module: str | None) -> str:
    """That a module of an extra is not installed, and how to install it, in one line; empty for any other module."""
    package = (module or "").partition(".")[0]
    return f'{package} is not installed; run pip install "um3[{EXTRAS[package]}]"' if package in EXTRAS else ""


def last_error(errors: str, *, code: int) -> str:
    """Why a command ended with `code`: the last error line of its standard error, else the last line."""
    lines = [line for line in errors.splitlines() if line.strip()] or [f"exit code {code}"]
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return reason.removeprefix("error: ")


def system_problem(error: BaseException) -> str:
    """What the operating system refused, where, and a remedy, in one line; empty for any other error.

    Errors of safetensors and tokenizers have the system's number only in their text, errors of torch not even that.
    """
    number = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|bad_alloc|map segment", str(error)):
        code = errno.ENOMEM
    if code is None:
        return ""
    path = getattr(error, "filename", None)
    where = "" if path is None else f"{os.fsdecode(path)}: " if isinstance(path, bytes) else f"{path}: "
    return f"{where}{os.strerror(code)}; {REMEDIES.get(code, 'check the path')}"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _is_parallel() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave(message: str, *, code: int) -> NoReturn:
    # From here on a launcher's SIGTERM ends this process silently.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_reported = code == EXIT_LOST_RANK and LAUNCHER in os.environ
    if int(os.environ.get("RANK", "0")) > 0 and not is_reported:
        # Ranks mostly fail alike: rank 0 prints the message, and the launcher stops the others before they repeat it.
        time.sleep(3)
    if not is_reported:
        print(printable(message), file=sys.stderr, flush=True)
    if _is_parallel():
        # An orderly exit would wait forever for ranks that wait in a collective; now the launcher stops them.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
