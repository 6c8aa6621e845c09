"""Logging: rank 0 logs from INFO on, the other ranks from WARNING on."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from um3.core.distributed import is_main, rank
from um3.core.errors import Interrupted, UserError
from um3.core.text import printable

PROGRESS = "um3.core.progress"
"""The logger of progress lines, which only log files show: the terminal has its own."""


class EscapingFormatter(logging.Formatter):
    """One line a message: control characters in names and texts from outside are escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)


def setup_logging() -> None:
    """Send log lines and warnings to stderr, each on one line; third-party packages log from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    where = "" if is_main() else f"rank {rank()} "
    handler.setFormatter(EscapingFormatter(f"%(asctime)s {where}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {printable(message)}\n"
    for room in ("__main__", "um3", "tokenizer", "data_mix", "downstream", "eval", "train"):
        logging.getLogger(room).setLevel(logging.INFO if is_main() else logging.WARNING)
    for noisy in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class LogFile(logging.FileHandler):
    """A log file that does not stop or disturb the program when it cannot be written: the disk may be full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """What the program itself writes tells of the full disk."""

    def add(self, message: str, *, error: BaseException | None = None) -> None:
        """Append a message, and the traceback of an error."""
        traceback = error and (type(error), error, error.__traceback__)
        self.handle(logging.makeLogRecord({"msg": message, "exc_info": traceback}))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append log lines, progress and the error that ends the block to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(EscapingFormatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    logging.getLogger(PROGRESS).setLevel(logging.DEBUG)
    try:
        yield
    except UserError as error:
        handler.add(f"error: {error}")
        raise
    except Interrupted:
        raise  # the loop has logged it
    except Exception as error:
        handler.add("error:", error=error)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def quiet_bars_in_logs() -> None:
    """Hide the progress bars of every library if they would fill a log; call before the libraries are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def quiet_model_files() -> None:
    """Hide transformers' progress bars for weight files; downloads from the hub keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()
