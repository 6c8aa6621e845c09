"""`python -m eval ablation --table FILE --config FOLDER --run FOLDER`: train and measure the rows of a table.

Every row is a run of its own below the run folder, made by the same commands as any other (`python -m train`,
`python -m eval run`), so that a row is resumed where it was stopped and not made again when it is up to date.
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
from statistics import fmean, stdev
from typing import Literal

from data_mix.sources.image_sources import ImageSourceConfig
from eval.report.figures import SAVED_DPI, curves
from eval.scores import Score, read_scores
from eval.tasks.validation_data import trained_on
from um3.core.commands import command_parser
from um3.core.config import load_config
from um3.core.errors import Terminated, UserError
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
    um3: list[str] | None = None
    """None: the row does not have this phase. A UM3 learns the codes of the table's base run, unless it names others.
    In a setting, {after} is the folder of the row that `after` names, {text} the text half of its UM3 as a plain
    language model, and {base} the folder of the base run."""
    after: str = ""
    """An earlier row, which this one starts from."""
    alone: Literal["", "contrastive", "mse"] = ""
    """Which of the two losses this row has, for the rule that balances them (the quantizer's own terms stay)."""
    paper: list[float | None] = field(default_factory=list)


@dataclass
class Table:
    """A table of runs. `columns`: key of a score -> heading. `curves`: key of a metric -> title, for a picture of how
    it goes in the last phase of every row. Each row is made once for each of the seeds 0, 1, ..."""

    title: str = ""
    seeds: int = 1
    columns: dict[str, str] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be at least 1")
        folders = [_slug(row.name) for row in self.rows]
        if not folders or len(set(folders)) < len(folders) or not all(folders):
            names = [row.name for row in self.rows]
            raise ValueError(f"rows {names}: a table needs rows, each with letters or digits of its own as a name")
        for number, row in enumerate(self.rows):
            if row.after and row.after not in [earlier.name for earlier in self.rows[:number]]:
                raise ValueError(f"row '{row.name}' comes after '{row.after}', which is no row above it")
            if row.um3 is None and row.stage1 is None and (row.stage2 is None or number == 0):
                raise ValueError(
                    f"row '{row.name}' needs a stage1 or um3 (an empty list will do), or a stage2 after a row"
                )
            if row.paper and len(row.paper) != len(self.columns):
                raise ValueError(
                    f"row '{row.name}' has {len(row.paper)} values of the paper for {len(self.columns)} columns"
                )


def main(arguments: Sequence[str]) -> None:
    """Make the rows that are not there yet, then print and write the table."""
    parser = command_parser("python -m eval ablation", "Train and measure the rows of an ablation.", config="required")
    parser.add_argument("--table", required=True, help="YAML file of the table, such as configs/ablations/weights.yaml")
    parser.add_argument("--run", required=True, help="folder for the rows' runs and the table")
    parser.add_argument("--base", default="", help="run whose tokenizer and codes the rows with a UM3 learn from")
    parser.add_argument("--processes", type=int, default=1, help="training processes of a run (default 1)")
    parser.add_argument("--alone", action="store_true", help="only the rows with a single loss, and their ratio")
    options = parser.parse_intermixed_args(arguments)
    table = load_config(Table, path=options.table)
    if options.alone:
        table.rows = [row for row in table.rows if row.alone]
        if not table.rows:
            raise UserError(f"{options.table} has no row with a single loss (`alone`)")
    runs = {row.name: _folders(row, table=table, run=Path(options.run)) for row in table.rows}
    for number, row in enumerate(table.rows, start=1):
        for seed, folder in enumerate(runs[row.name]):
            print(f"row {number} of {len(table.rows)}: {row.name}" + f", seed {seed}" * (table.seeds > 1), flush=True)
            seeded = [f"loop.seed={seed}"] if table.seeds > 1 else []
            after = str(runs[row.after][seed]) if row.after else ""
            first = next(iter(runs.values()))[0]
            _make(row, folder=folder, seeded=seeded, after=after, first=first, options=options)
    scores = {row.name: [_scores(folder, row=row) for folder in runs[row.name]] for row in table.rows}
    lines = markdown(table, scores=scores)
    if ratio := balance({row.alone: runs[row.name][0] for row in table.rows if row.alone}):
        lines += ["", ratio]
    path = Path(options.run) / ("balance.md" if options.alone else "table.md")
    write_text(path, "\n".join([f"# {table.title}", "", *lines]) + "\n")
    values = {
        name: [{key: score.to_dict() for key, score in found.items()} for found in seeds]
        for name, seeds in scores.items()
    }
    write_json(path.with_suffix(".json"), values)
    print("\n".join([table.title, *lines, str(path)]))
    if table.curves:
        print(_draw_curves(table, runs=runs, path=path.with_name("curves.png")))


def _folders(row: Row, *, table: Table, run: Path) -> list[Path]:
    """The row's run folder for each seed."""
    place = run / _slug(row.name)
    return [place] if table.seeds == 1 else [place / f"seed-{seed}" for seed in range(table.seeds)]


def _make(row: Row, *, folder: Path, seeded: list[str], after: str, first: Path, options: argparse.Namespace) -> None:
    """Train the row's phases in `folder` and measure what they made. `first`: the folder of the table's first row."""
    commands: dict[str, list[str]] = {}
    if row.stage1 is not None:
        commands["stage1"] = [*options.overrides, *row.stage1]
    if row.stage2 is not None:
        commands["stage2"] = [f"init_from={folder}/stage1/model", *row.stage2]
    if row.um3 is not None:
        commands["um3"] = [
            "visual_tokenizer={base}/stage2/model",
            "data.codes={base}/codes",
            *options.overrides,
            *row.um3,
        ]
    text = Path(after) / "um3-export"
    if any("{text}" in each for settings in commands.values() for each in settings) and not text.exists():
        _run(
            ["um3", "export", f"{after}/um3/model", "--out", str(text)],
            row=row,
            made=text / "config.json",
        )
    places = {"{after}": after, "{text}": str(text), "{base}": options.base}
    for phase, settings in commands.items():
        given = [_filled(each, places) for each in [*settings, *seeded]]
        train = ["train", "--processes", str(options.processes), phase, "--config", options.config]
        _run([*train, f"loop.output_dir={folder}/{phase}", *given], row=row, made=folder / phase / "done.json")
    # Whatever a row trains on, all are measured on the images that the first one, or the base run, holds out.
    held_out = str(first) if row.um3 is None else options.base
    sources = trained_on(held_out, phase="stage1", key="sources", kind=ImageSourceConfig)
    images = json.dumps([dataclasses.asdict(source) for source in sources])
    parts = _parts(row)
    measure = ["eval", "run", "--config", options.config, f"run={folder}", f"images={images}"]
    _run([*measure, f"parts=[{','.join(parts)}]"], row=row, made=folder / "eval" / f"{parts[-1]}.json")


def _filled(setting: str, places: dict[str, str]) -> str:
    for name, folder in places.items():
        setting = setting.replace(name, folder)
    return setting


def _parts(row: Row) -> tuple[str, ...]:
    """The parts of an evaluation that measure what a row makes."""
    return ("tokenizer",) if row.um3 is None else ("language", "captions", "generation")


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


def _draw_curves(table: Table, *, runs: dict[str, list[Path]], path: Path) -> Path:
    metrics = {}
    for row in table.rows:
        phase = "um3" if row.um3 is not None else "stage2" if row.stage2 is not None else "stage1"
        metrics[row.name] = [read_metrics(folder / phase / "metrics.jsonl") for folder in runs[row.name]]
    with atomic_file(path) as partial:
        curves(metrics, titles=table.curves).savefig(partial, dpi=SAVED_DPI, format="png")
    return path


def _scores(folder: Path, *, row: Row) -> dict[str, Score]:
    files = [folder / "eval" / f"{part}.json" for part in _parts(row)]
    return {score.key: score for file in files for score in read_scores(file)}


def markdown(table: Table, *, scores: dict[str, list[dict[str, Score]]]) -> list[str]:
    """The lines of a Markdown table: each value, and the paper's behind it where it has one.

    `scores`: by row, by seed, by key. Of several seeds the mean is shown, with their standard deviation.

    Raises:
        UserError: a column that no row has a score for.
    """
    known = sorted({key for seeds in scores.values() for found in seeds for key in found})
    if unknown := [key for key in table.columns if key not in known]:
        raise UserError(f"no run has a score '{unknown[0]}'; there are {', '.join(known)}")
    lines = ["| | " + " | ".join(table.columns.values()) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for row in table.rows:
        cells = []
        for number, key in enumerate(table.columns):
            paper = row.paper[number] if row.paper else None
            cells.append(_cell([found[key] for found in scores[row.name] if key in found], paper=paper))
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def _cell(scores: list[Score], *, paper: float | None) -> str:
    values = [score.value for score in scores if score.value is not None]
    if not values:
        return "–"
    shown = scores[0].shown(fmean(values))
    if len(values) > 1:
        shown += f" ± {scores[0].shown(stdev(values))}"
    return shown if paper is None else f"{shown} (paper {scores[0].shown(paper)})"


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
