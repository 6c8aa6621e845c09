"""`python -m eval.ablation --table FILE --config FOLDER --run FOLDER`: train and measure the rows of a table.

Every row is a run of its own below the run folder, made by the same commands as any other (`python -m train`,
`python -m eval.run`), so that a row is resumed where it was stopped and not made again when it is up to date.
"""

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from data_mix.sources import ImageSourceConfig
from eval.figures import SAVED_DPI, curves
from eval.held_out import trained_on
from eval.scores import Score, read_scores
from um3.core.config import load_config
from um3.core.errors import Terminated, UserError, run_main
from um3.core.files import atomic_file, write_json, write_text
from um3.core.metrics import read_metrics

CONVERGED = 0.1
"""A loss at convergence is the mean over this last share of the logged steps."""
LOSSES = {"contrastive": "train/contrastive", "mse": "train/mse"}


@dataclass
class Row:
    """One run: the settings over each phase's config, and the paper's values in the order of the columns."""

    name: str = ""
    stage1: list[str] | None = None
    stage2: list[str] | None = None
    """None: the row does not have this stage. {after} in a setting is the folder of the row that `after` names."""
    after: str = ""
    """An earlier row, whose tokenizer this one starts from."""
    alone: Literal["", "contrastive", "mse"] = ""
    """Which of the two losses this row has, for the rule that balances them (the quantizer's own terms stay)."""
    paper: list[float | None] = field(default_factory=list)


@dataclass
class Table:
    """A table of runs. `columns`: key of a score -> heading. `curves`: key of a metric -> title, for a picture of how
    it goes in stage 1 of every row."""

    title: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        folders = [_slug(row.name) for row in self.rows]
        if not folders or len(set(folders)) < len(folders) or not all(folders):
            names = [row.name for row in self.rows]
            raise ValueError(f"rows {names}: a table needs rows, each with letters or digits of its own as a name")
        for number, row in enumerate(self.rows):
            if row.after and row.after not in [earlier.name for earlier in self.rows[:number]]:
                raise ValueError(f"row '{row.name}' comes after '{row.after}', which is no row above it")
            if row.stage1 is None and (row.stage2 is None or number == 0):
                raise ValueError(f"row '{row.name}' needs a stage1 (an empty list will do), or a stage2 after a row")
            if row.paper and len(row.paper) != len(self.columns):
                raise ValueError(
                    f"row '{row.name}' has {len(row.paper)} values of the paper for {len(self.columns)} columns"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are not there yet, then print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m eval.ablation", description="Train and measure a table's rows.")
    parser.add_argument("--table", required=True, help="YAML file of the table, such as configs/ablations/weights.yaml")
    parser.add_argument("--config", required=True, help="folder of the configs the rows change, such as configs/demo")
    parser.add_argument("--run", required=True, help="folder for the rows' runs and the table")
    parser.add_argument("--processes", type=int, default=1, help="training processes of a run (default 1)")
    parser.add_argument("--alone", action="store_true", help="only the rows with a single loss, and their ratio")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of stage 1 in every row")
    options = parser.parse_intermixed_args(arguments)
    table = load_config(Table, path=options.table)
    if options.alone:
        table.rows = [row for row in table.rows if row.alone]
        if not table.rows:
            raise UserError(f"{options.table} has no row with a single loss (`alone`)")
    folders = {row.name: Path(options.run) / _slug(row.name) for row in table.rows}
    for number, row in enumerate(table.rows, start=1):
        print(f"row {number} of {len(table.rows)}: {row.name}", flush=True)
        _make(row, folders=folders, options=options)
    scores = {name: _scores(folder) for name, folder in folders.items()}
    lines = markdown(table, scores=scores)
    if ratio := balance({row.alone: folders[row.name] for row in table.rows if row.alone}):
        lines += ["", ratio]
    path = Path(options.run) / ("balance.md" if options.alone else "table.md")
    write_text(path, "\n".join([f"# {table.title}", "", *lines]) + "\n")
    values = {name: {key: row.to_dict() for key, row in found.items()} for name, found in scores.items()}
    write_json(path.with_suffix(".json"), values)
    print("\n".join([table.title, *lines, str(path)]))
    if table.curves:
        print(_draw_curves(table, folders=folders, path=path.with_name("curves.png")))


def _make(row: Row, *, folders: dict[str, Path], options: argparse.Namespace) -> None:
    folder, configs = folders[row.name], Path(options.config)
    commands: dict[str, list[str]] = {}
    if row.stage1 is not None:
        commands["stage1"] = [*options.overrides, *row.stage1]
    if row.stage2 is not None:
        commands["stage2"] = [f"tokenizer={folder}/stage1/model", *row.stage2]
    for phase, settings in commands.items():
        given = [setting.replace("{after}", str(folders.get(row.after, ""))) for setting in settings]
        train = ["train", "--processes", str(options.processes), phase, "--config", f"{configs}/{phase}.yaml"]
        _run([*train, f"loop.folder={folder}/{phase}", *given], row=row, made=folder / phase / "done.json")
    # Whatever a row trains on, all are measured on the images that the first one holds out.
    first = str(next(iter(folders.values())))
    sources = trained_on(first, phase="stage1", key="sources", kind=ImageSourceConfig)
    images = json.dumps([dataclasses.asdict(source) for source in sources])
    measure = ["eval.run", "--config", f"{configs}/eval.yaml", f"run={folder}", "parts=[tokenizer]", f"images={images}"]
    _run(measure, row=row, made=folder / "eval" / "tokenizer.json")


def _run(command: list[str], *, row: Row, made: Path) -> None:
    """Run `python -m COMMAND`; what asks this process to stop is passed on, and waited for: it saves its state.

    Raises:
        UserError: it failed, or ended before it had written `made`.
    """
    # In a session of its own, or the terminal's Ctrl-C would reach it twice.
    child = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        code = child.wait()
    except (KeyboardInterrupt, Terminated) as stop:
        child.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        child.wait()
        raise
    if code or not made.exists():
        ending = f"with exit code {code}" if code else "before its end"
        raise UserError(f"row '{row.name}' stopped {ending} in {made.parent.name}; the same command goes on")


def _draw_curves(table: Table, *, folders: dict[str, Path], path: Path) -> Path:
    rows = {name: read_metrics(folder / "stage1" / "metrics.jsonl") for name, folder in folders.items()}
    with atomic_file(path) as partial:
        curves(rows, titles=table.curves).savefig(partial, dpi=SAVED_DPI, format="png")
    return path


def _scores(folder: Path) -> dict[str, Score]:
    return {score.key: score for score in read_scores(folder / "eval" / "tokenizer.json")}


def markdown(table: Table, *, scores: dict[str, dict[str, Score]]) -> list[str]:
    """The lines of a Markdown table: each value, and the paper's behind it where it has one.

    Raises:
        UserError: a column that no row has a score for.
    """
    for key in table.columns:
        if not any(key in row for row in scores.values()):
            raise UserError(f"no run has a score '{key}'; there are {', '.join(sorted(next(iter(scores.values()))))}")
    lines = ["| | " + " | ".join(table.columns.values()) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for row in table.rows:
        cells = []
        for number, key in enumerate(table.columns):
            score = scores[row.name].get(key)
            paper = row.paper[number] if row.paper else None
            shown = score.shown() if score else "–"
            cells.append(shown if paper is None or score is None else f"{shown} (paper {score.shown(paper)})")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def balance(alone: dict[str, Path]) -> str:
    """The paper's rule for the weights (section 3): a_r / a_a is about L_align / L_mse, each trained alone to its end.

    Empty unless there is a run of each loss.
    """
    if set(alone) != set(LOSSES):
        return ""
    last = {}
    for name, key in LOSSES.items():
        values = [row[key] for row in read_metrics(alone[name] / "stage1" / "metrics.jsonl")]
        last[name] = fmean(values[-max(1, round(CONVERGED * len(values))) :])
    ratio = last["contrastive"] / last["mse"]
    parts = f"contrastive {last['contrastive']:.4g} / squared error {last['mse']:.4g}"
    return f"a_r / a_a = {ratio:.3g}: {parts}, each without the other (mean of the last {CONVERGED:.0%} of its steps)"


def _slug(name: str) -> str:
    """A folder name: letters, digits and single dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.replace(",", "")).split())


if __name__ == "__main__":
    run_main(main)
