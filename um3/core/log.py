"""Logging: rank 0 logs from INFO on, the other ranks from WARNING on."""

import logging
import sys
import warnings

from um3.core.distributed import is_main, rank
from um3.core.text import printable


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
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {printable(message)}\n"
    for room in ("__main__", "um3", "tokenizer", "data_mix", "downstream", "eval", "train"):
        logging.getLogger(room).setLevel(logging.INFO if is_main() else logging.WARNING)
    for noisy in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def quiet_model_files() -> None:
    """Hide transformers' progress bars for weight files; downloads from the hub keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()
