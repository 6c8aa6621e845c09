"""The contents of a run folder, for a report. A phase that has not run is an empty entry, not an error."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.config import PARTS
from eval.scores import Score, read_scores
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.metrics import read_metrics

TRAINING_PHASES = ("stage1", "stage2", "um3")
BENCHMARKS = {
    "coco_captions": "captions",
    "coco_generation": "generation",
    "geneval": "generation",
    "dpg": "generation",
}
"""Results of the benchmark commands, and the part of the evaluation whose rows they join."""


@dataclass(frozen=True)
class RunData:
    """One run: scores by key and by part, results and images of each part, done.json and metrics of each phase."""

    folder: Path
    scores: dict[str, Score]
    rows_by_part: dict[str, list[Score]]
    parts: dict[str, dict[str, Any]]
    images: dict[str, dict[str, NDArray]]
    phases: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    codes: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def samples(self, part: str) -> dict[str, Any]:
        """The samples that a part kept to look at; empty if it has not run."""
        return self.parts.get(part, {}).get("samples") or {}


def load_run(folder: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: the folder is missing, has no results, or has a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; train one with make demo, or correct --run")
    files = {part: folder / "eval" / f"{part}.json" for part in (*PARTS, *BENCHMARKS)}
    files = {part: path for part, path in files.items() if path.is_file()}
    rows: dict[str, list[Score]] = {}
    for part, path in files.items():
        rows.setdefault(BENCHMARKS.get(part, part), []).extend(read_scores(path))
    parts: dict[str, Any] = {part: read_json(files[part]) for part in PARTS if part in files}
    phases = {phase: read_json(path) for phase in TRAINING_PHASES if (path := folder / phase / "done.json").is_file()}
    metrics = {phase: read_metrics(folder / phase / "metrics.jsonl") for phase in TRAINING_PHASES}
    summary = folder / "codes" / "summary.json"
    if not rows and not phases and not any(metrics.values()):
        raise UserError(f"{folder} has no training phase and no evaluation; --run takes a run folder such as runs/demo")
    return RunData(
        folder=folder,
        scores={score.key: score for scores in rows.values() for score in scores},
        rows_by_part=rows,
        parts=parts,
        images={part: _arrays(folder / "eval" / f"{part}.npz") for part in parts},
        phases=phases,
        metrics=metrics,
        codes=read_json(summary) if summary.is_file() else {},
    )


def _arrays(path: Path) -> dict[str, NDArray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run make eval") from None
