"""The contents of a run folder, for a report. A phase that has not run is an empty entry, not an error."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.config import PARTS
from eval.part_files import Part, read_images, read_record
from eval.report.samples import MAKERS, TileGroup
from eval.scores import Score, scores_of
from eval.vqa.sets import SETS
from um3.core.errors import UserError
from um3.core.metrics import read_metrics
from um3.core.text import valid_text

TRAINING_PHASES = ("stage1", "stage2", "um3")
BENCHMARKS = {"coco_captions": "captions"} | dict.fromkeys(("coco_generation", "geneval", "dpg"), "generation")
BENCHMARKS |= {f"vqa_{name}": "vqa" for name in SETS}
"""Results of the benchmark commands, and the part of the evaluation whose rows they join."""
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading values of another form raises."""


@dataclass
class RunData:
    """One run: rows by part, files of each part, done.json and metrics of each phase, images to show.

    `problems` has a line for every file that could not be used; the report leaves out what it holds.
    """

    folder: Path
    rows_by_part: dict[str, list[Score]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    codes: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, list[Any]] = field(default_factory=dict)
    """What the page shows of the samples, by the names in `eval.report.samples.MAKERS`."""
    problems: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    """Names of sources for the reader, where they are not those of the config."""

    def source_title(self, name: str) -> str:
        """The name of a source: for the `data` of make's DATA= its own, which is the last part of its path."""
        return self.titles.get(name, name)

    @property
    def is_language_only(self) -> bool:
        """Whether the run holds evaluations of a language model, and nothing about images."""
        is_trained = bool(self.phases) or any(self.metrics.values())
        return not is_trained and [part for part, rows in self.rows_by_part.items() if rows] == ["language"]

    @property
    def name(self) -> str:
        """The folder's name."""
        return valid_text(self.folder.resolve().name)

    @functools.cached_property
    def scores(self) -> dict[str, Score]:
        """All rows by key."""
        return {score.key: score for rows in self.rows_by_part.values() for score in rows}

    def attempt(self, what: str | Path, read: Callable[..., Any], *arguments: Any, default: Any) -> Any:
        """The result of `read`; if it meets values that cannot be used, `default` and a line in `problems`."""
        try:
            return read(*arguments)
        except (UserError, OSError) as error:
            self.problems.append(str(error))
        except ODD as error:
            self.problems.append(f"{what} holds values of another form ({error!r:.160}); run the phase that wrote it")
        return default


def load_run(folder: str | Path) -> RunData:
    """Read a run folder. Raises UserError: the folder is missing or has no results."""
    run = RunData(Path(folder))
    if not run.folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; train one with make demo, or correct --run")
    for part in (*PARTS, *BENCHMARKS):
        path = run.folder / "eval" / f"{part}.json"
        record = run.attempt(path, read_record, path, default=None) if path.exists() else None
        rows = run.attempt(path, scores_of, record, path, default=[]) if record else []
        run.rows_by_part.setdefault(BENCHMARKS.get(part, part), []).extend(rows)
        if record and part in PARTS:
            images = run.attempt(path, read_images, path, record, default=None)
            run.parts[part] = Part(record | {"samples": None} if images is None else record, rows, images or {})
    for phase in TRAINING_PHASES:
        done, metrics = run.folder / phase / "done.json", run.folder / phase / "metrics.jsonl"
        if done.exists() and (record := run.attempt(done, read_record, done, default=None)):
            run.phases[phase] = record
        run.metrics[phase] = run.attempt(metrics, read_metrics, metrics, default=[])
    if not (run.scores or run.parts or run.phases or any(run.metrics.values()) or run.problems):
        raise UserError(f"{folder} has no training phase and no evaluation; --run takes a run folder such as runs/demo")
    summary = run.folder / "codes" / "summary.json"
    run.codes = run.attempt(summary, read_record, summary, default={}) if summary.exists() else {}
    configs = [record.get("config") for record in [*run.phases.values(), *(part.record for part in run.parts.values())]]
    run.titles = run.attempt(f"{folder}: a config", _titles, configs, default={})
    for name, (part, make) in MAKERS.items():
        path = run.folder / "eval" / f"{part}.json"
        shown = run.attempt(path, make, run.parts[part], run.scores, default=[]) if part in run.parts else []
        run.shown[name] = [_titled(group, run) if isinstance(group, TileGroup) else group for group in shown]
    return run


def _titles(config: Any) -> dict[str, str]:
    """The titles of the source that make names `data`, in any list of sources of a config."""
    if isinstance(config, list):
        return {name: title for item in config for name, title in _titles(item).items()}
    if not isinstance(config, dict):
        return {}
    path = config.get("path")
    if config.get("name") == "data" and isinstance(path, str) and (title := Path(path.partition("*")[0]).stem):
        return {"data": valid_text(title)}
    return _titles(list(config.values()))


def _titled(group: TileGroup, run: RunData) -> TileGroup:
    return group._replace(title=run.source_title(group.title), source=run.source_title(group.source))
