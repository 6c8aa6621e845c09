"""Metrics: `metrics.jsonl` is the truth, TensorBoard and Weights & Biases are views of it."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from um3.core.errors import UserError
from um3.core.files import write_text

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON object per logged step to `metrics.jsonl`, flushed at once.

    A resumed run drops the lines after the step it resumes from, so the file always reads as one
    undisturbed run. `views` names further trackers: "tensorboard", "wandb".
    """

    def __init__(self, folder: str | Path, *, resume_step: int = 0, views: tuple[str, ...] = (), config: Any = None):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")
        self.tensorboard = self.wandb = None
        if "tensorboard" in views:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tracking with tensorboard needs the package: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resume_step + 1)
        if "wandb" in views:
            try:
                import wandb
            except ImportError:
                raise UserError("tracking with wandb needs the package: pip install wandb") from None
            self.wandb = wandb.init(
                project="um3",
                dir=str(folder),
                config=config,
                resume="allow",
                id=Path(folder).resolve().as_posix().replace("/", "-")[-64:],
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one row; a non-finite value is kept as its name ("nan", "inf") so the file stays JSON."""
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
    """Rows of a metrics.jsonl, each with its "step"; none where there is no file.

    What is no such row, such as a last line cut short by a kill, is left out.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for row in map(_row, lines) if row is not None]
    if len(rows) < len(lines):
        logger.warning("%s: left out %d line(s) that are no row of metrics", path, len(lines) - len(rows))
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
