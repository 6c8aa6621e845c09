"""Metrics: `metrics.jsonl` is the record, TensorBoard and Weights & Biases are views of it.

`commit`, `versions` and `machine` say where a number comes from.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from um3.core.distributed import usable_cores
from um3.core.errors import UserError
from um3.core.files import parse_json, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "lm-eval", "pycocoevalcap", "numpy")


class Samples(NamedTuple):
    """What a model does, to look at: images uint8 (N, H, W, 3), each with its text (a prompt, a caption)."""

    images: "NDArray"
    texts: Sequence[str]


NO_SAMPLES: Mapping[str, Samples] = MappingProxyType({})


class MetricsWriter:
    """Appends one JSON object per logged step to `metrics.jsonl` and flushes it; `views`: "tensorboard", "wandb".

    A resumed run drops the lines after its checkpoint's step, so that the file always reads as one run without
    interruption; it warns if fewer than the checkpoint's `num_rows` are there.
    """

    def __init__(
        self, folder: Path, *, resume_step: int = 0, num_rows: int = 0, views: Sequence[str] = (), config: Any = None
    ):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        self.num_rows = len(kept)
        if self.num_rows < num_rows:
            text = "%s was cut or deleted: it has %d of the %d rows up to step %d; the others stay missing"
            logger.warning(text, self.path, self.num_rows, num_rows, resume_step)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in views:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        if "wandb" in views:
            import wandb

            run_id = folder.resolve().as_posix().replace("/", "-")[-64:]
            self.wandb = wandb.init(project="um3", dir=str(folder), config=config, resume="allow", id=run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one row; a non-finite value is written as its name ("nan", "inf"), so that the file stays JSON."""
        row = {"step": step} | {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.num_rows += 1
        for key, value in values.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def show(self, step: int, samples: Mapping[str, Samples]) -> None:
        """Show images with their texts in the views; metrics.jsonl has numbers only."""
        for name, (images, texts) in samples.items():
            if self.tensorboard:
                self.tensorboard.add_images(name, images, step, dataformats="NHWC")
                self.tensorboard.add_text(name, "\n".join(f"1. `{text}`" for text in texts), step)
            if self.wandb:
                import wandb

                pictures = [wandb.Image(image, caption=text) for image, text in zip(images, texts, strict=True)]
                self.wandb.log({name: pictures}, step=step)

    def close(self) -> None:
        """Close the file and the views."""
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, if it exists; invalid lines, such as one cut by a kill, are skipped and reported."""
    if not Path(path).exists():
        return []
    lines, rows = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), []
    for line in lines:
        with contextlib.suppress(UserError):
            row = parse_json(line, where=path, keys=["step"])
            rows += [row] if isinstance(row["step"], int) else []
    if len(rows) < len(lines):
        logger.warning("%s: skipped %d line(s) without metrics of a step", path, len(lines) - len(rows))
    return rows


def commit() -> str:
    """The checkout's commit, with `+changes` if the tree has changes; "unknown" outside a checkout."""
    options: Any = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", ":/"])
    try:
        head, status = (subprocess.run(["git", *command], **options).stdout.strip() for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if status else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    installed = {"python": platform.python_version()} | dict.fromkeys(PACKAGES, "absent")
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def machine() -> dict[str, str | int]:
    """The platform and number of CPU cores of this machine."""
    return {"platform": platform.platform(), "cpu_cores": usable_cores()}
