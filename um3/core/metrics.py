"""Metrics: `metrics.jsonl` is the record; TensorBoard and Weights & Biases are views of it."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from um3.core.errors import UserError
from um3.core.files import write_text

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON object per logged step to `metrics.jsonl` and flushes it.

    A resumed run drops the lines after its checkpoint's step, so that the file always reads as one run without
    interruption. `views` names further loggers: "tensorboard", "wandb".
    """

    def __init__(self, folder: str | Path, *, resume_step: int = 0, views: tuple[str, ...] = (), config: Any = None):
        self.path = Path(folder) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")
        self.tensorboard = self.wandb = None
        try:
            if "tensorboard" in views:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resume_step + 1)
            if "wandb" in views:
                import wandb

                run_id = Path(folder).resolve().as_posix().replace("/", "-")[-64:]
                self.wandb = wandb.init(project="um3", dir=str(folder), config=config, resume="allow", id=run_id)
        except ImportError as error:
            package = "wandb" if error.name == "wandb" else "tensorboard"
            raise UserError(f"loop.loggers names {package}, which is not installed: pip install {package}") from None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one row; a non-finite value is written as its name ("nan", "inf"), so that the file stays JSON."""
        row = {"step": step} | {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Close the file and the views."""
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, each with its "step"; empty if the file does not exist.

    Invalid lines, such as a last line cut by a kill, are skipped and reported.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for row in map(_row, lines) if row is not None]
    if len(rows) < len(lines):
        logger.warning("%s: skipped %d line(s) without metrics of a step", path, len(lines) - len(rows))
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
