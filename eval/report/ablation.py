"""`python -m eval ablation --table FILE --config FILE --run FOLDER`: train and measure the rows of an ablation.

Every row is a run of its own inside the run folder, made with `python -m train` and `python -m eval run`. Therefore a
stopped row resumes, and a row that is up to date is skipped.
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
from eval.report.figures import curves, points, save, themed
from eval.report.table import Cell, Row, Table, markdown
from eval.scores import Score, read_scores
from eval.tasks.validation_data import trained_on
from um3.core.commands import command_parser
from um3.core.config import load_config
from um3.core.errors import Terminated, UserError
from um3.core.files import write_json, write_text
from um3.core.metrics import read_metrics
from um3.core.ranges import PositiveInt

CONVERGED = 0.1
"""A loss at convergence is the mean over this last share of the logged steps."""
LOSSES = {"contrastive": "train/contrastive", "mse": "train/mse"}


@dataclass
class AblationRow:
    """One run: its settings for each phase, on top of the experiment's, and the paper's values by column.

    A phase that is None is not run. A row with `um3` trains on the codes of the base run unless its settings name
    other codes. Settings may contain {after}, the folder of the row that `after` names, {text}, the text half of that
    row's UM3 as a plain language model, and {base}, the folder of the base run.
    """

    name: str = ""
    stage1: list[str] | None = None
    stage2: list[str] | None = None
    um3: list[str] | None = None
    after: str = ""
    """An earlier row that this row starts from."""
    alone: Literal["", "contrastive", "mse"] = ""
    """The only loss of this row besides the quantizer's, for the rule that balances the two losses."""
    paper: list[float | None] = field(default_factory=list)

    @property
    def last_phase(self) -> str:
        """The last training phase of the row."""
        return "um3" if self.um3 is not None else "stage2" if self.stage2 is not None else "stage1"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the evaluation that measure the row."""
        return ("tokenizer",) if self.um3 is None else ("language", "captions", "generation")

    def read_scores(self, run: Path) -> dict[str, Score]:
        """The scores of the row in its run folder, by key."""
        return {score.key: score for part in self.parts for score in read_scores(run / "eval" / f"{part}.json")}


@dataclass
class Ablation:
    """A table of runs, each made once per seed 0, 1, ...

    columns: key of a score -> heading. curves: key of a metric -> title of a panel that shows the metric in the last
    phase of every row.
    """

    title: str = ""
    seeds: PositiveInt = 1
    columns: dict[str, str] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    rows: list[AblationRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        folders = [_slug(name) for name in names]
        if not folders or len(set(folders)) < len(folders) or not all(folders):
            raise ValueError(f"rows {names}: a table needs rows whose names differ in their letters and digits")
        for number, row in enumerate(self.rows):
            if row.after and row.after not in names[:number]:
                raise ValueError(f"row '{row.name}' comes after '{row.after}', which is not the name of an earlier row")
            if row.um3 is None and row.stage1 is None and (row.stage2 is None or number == 0):
                raise ValueError(f"row '{row.name}' needs stage1 or um3 (an empty list will do), or stage2 after a row")
            if row.paper and len(row.paper) != len(self.columns):
                raise ValueError(
                    f"row '{row.name}' has {len(row.paper)} values of the paper for {len(self.columns)} columns"
                )

    def folders(self, row: AblationRow, *, run: Path) -> list[Path]:
        """The row's run folder for each seed."""
        folder = run / _slug(row.name)
        return [folder] if self.seeds == 1 else [folder / f"seed-{seed}" for seed in range(self.seeds)]


def main(arguments: Sequence[str]) -> None:
    """Make the rows that are missing or stale, then print and write the table."""
    parser = command_parser("python -m eval ablation", "Train and measure the rows of an ablation.", config="required")
    parser.add_argument("--table", required=True, help="YAML file of the table, such as configs/ablations/weights.yaml")
    parser.add_argument("--run", required=True, help="folder for the runs of the rows and for the table")
    parser.add_argument("--base", default="", help="run whose tokenizer and codes the rows with a um3 phase use")
    parser.add_argument("--processes", type=int, default=1, help="training processes of a run (default 1)")
    parser.add_argument(
        "--alone", action="store_true", help="only the rows with a single loss, and the ratio of the two"
    )
    options = parser.parse_intermixed_args(arguments)
    ablation = load_config(Ablation, path=options.table)
    if options.alone:
        ablation.rows = [row for row in ablation.rows if row.alone]
        if not ablation.rows:
            raise UserError(f"{options.table} has no row with a single loss; set `alone` in one, or omit --alone")
    runs = {row.name: ablation.folders(row, run=Path(options.run)) for row in ablation.rows}
    first = runs[ablation.rows[0].name][0]
    for number, row in enumerate(ablation.rows, start=1):
        for seed, folder in enumerate(runs[row.name]):
            seeded = f", seed {seed}" if ablation.seeds > 1 else ""
            print(f"row {number} of {len(ablation.rows)}: {row.name}{seeded}", flush=True)
            settings = [f"loop.seed={seed}"] if seeded else []
            after = str(runs[row.after][seed]) if row.after else ""
            _make(row, folder=folder, settings=settings, after=after, first=first, options=options)
    scores = {row.name: [row.read_scores(folder) for folder in runs[row.name]] for row in ablation.rows}
    lines = markdown(result_table(ablation, scores=scores))
    if ratio := balance({row.alone: runs[row.name][0] for row in ablation.rows if row.alone}):
        lines += ["", ratio]
    path = Path(options.run) / ("balance.md" if options.alone else "table.md")
    write_text(path, "\n".join([f"# {ablation.title}", "", *lines]) + "\n")
    values = {
        name: [{key: score.to_dict() for key, score in of_seed.items()} for of_seed in seeds]
        for name, seeds in scores.items()
    }
    write_json(path.with_suffix(".json"), values)
    print("\n".join([ablation.title, *lines, str(path)]))
    if ablation.curves:
        files = {row.name: [run / row.last_phase / "metrics.jsonl" for run in runs[row.name]] for row in ablation.rows}
        metrics = {name: list(map(read_metrics, of_seeds)) for name, of_seeds in files.items()}
        panels = {
            title: {name: [points(rows, key) for rows in of_seeds] for name, of_seeds in metrics.items()}
            for key, title in ablation.curves.items()
        }
        print(save(themed(curves(panels)), path.with_name("curves.png")))


def _make(
    row: AblationRow, *, folder: Path, settings: list[str], after: str, first: Path, options: argparse.Namespace
) -> None:
    """Train the phases of the row in `folder` and measure them. `first`: the folder of the table's first row."""
    phases: dict[str, list[str]] = {}
    if row.stage1 is not None:
        phases["stage1"] = [*options.overrides, *row.stage1]
    if row.stage2 is not None:
        phases["stage2"] = [f"init_from={folder}/stage1/model", *row.stage2]
    if row.um3 is not None:
        base = ["visual_tokenizer={base}/stage2/model", "data.codes={base}/codes"]
        phases["um3"] = [*base, *options.overrides, *row.um3]
    text = Path(after) / "um3-export"
    if any("{text}" in setting for of_phase in phases.values() for setting in of_phase) and not text.exists():
        _run(["um3", "export", f"{after}/um3/model", "--out", str(text)], row=row, output=text / "config.json")
    places = {"{after}": after, "{text}": str(text), "{base}": options.base}
    for phase, of_phase in phases.items():
        filled = [_fill(setting, places) for setting in [*of_phase, *settings]]
        train = ["train", phase, "--processes", str(options.processes), "--config", options.config]
        output = folder / phase / "done.json"
        _run([*train, f"loop.output_dir={folder}/{phase}", *filled], row=row, output=output)
    # All rows are measured on the validation images of the first row or of the base run, whatever they train on.
    reference = str(first) if row.um3 is None else options.base
    sources = trained_on(reference, phase="stage1", key="sources", kind=ImageSourceConfig)
    images = json.dumps([dataclasses.asdict(source) for source in sources])
    evaluate = ["eval", "run", "--config", options.config, f"run={folder}", f"images={images}"]
    output = folder / "eval" / f"{row.parts[-1]}.json"
    _run([*evaluate, f"parts=[{','.join(row.parts)}]"], row=row, output=output)


def _fill(setting: str, places: dict[str, str]) -> str:
    for name, folder in places.items():
        setting = setting.replace(name, folder)
    return setting


def _run(command: list[str], *, row: AblationRow, output: Path) -> None:
    """Run `python -m COMMAND`. A stop signal is passed on, and the command may save its state before this one ends.

    Raises:
        UserError: the command failed, or ended without writing `output`.
    """
    # In a session of its own: the terminal's Ctrl-C would reach the child twice otherwise.
    child = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        code = child.wait()
    except (KeyboardInterrupt, Terminated) as stop:
        child.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        child.wait()
        raise
    if code or not output.exists():
        reason = f"with exit code {code}" if code else f"without writing {output}"
        raise UserError(f"row '{row.name}' stopped {reason} in {output.parent.name}; run the same command to resume")


def result_table(ablation: Ablation, *, scores: dict[str, list[dict[str, Score]]]) -> Table:
    """Each value, with the paper's behind it if there is one; `scores`: by row, by seed, by key.

    Of several seeds the table shows the mean and the standard deviation.

    Raises:
        UserError: a column for which no row has a score.
    """
    known = sorted({key for seeds in scores.values() for of_seed in seeds for key in of_seed})
    if unknown := [key for key in ablation.columns if key not in known]:
        raise UserError(f"columns: no run has a score '{unknown[0]}'; use one of {', '.join(known)}")
    rows = []
    for row in ablation.rows:
        paper = row.paper or [None] * len(ablation.columns)
        of_columns = [[of_seed[key] for of_seed in scores[row.name] if key in of_seed] for key in ablation.columns]
        rows.append(Row(row.name, [_cell(*pair) for pair in zip(of_columns, paper, strict=True)]))
    return Table(ablation.title, list(ablation.columns.values()), rows, num_values=len(ablation.columns))


def _cell(scores: list[Score], paper: float | None) -> Cell:
    values = [score.value for score in scores if score.value is not None]
    if not values:
        return Cell("–")
    shown = scores[0].shown(fmean(values))
    if len(values) > 1:
        shown += f" ± {scores[0].shown(stdev(values))}"
    return Cell(shown, "" if paper is None else f"(paper {scores[0].shown(paper)})")


def balance(alone: dict[str, Path]) -> str:
    """The paper's rule for the weights (section 3): a_r / a_a is about L_align / L_mse, each trained alone.

    `alone` maps a loss to the run that has this loss only. Empty unless there is a run of each loss.
    """
    if set(alone) != set(LOSSES):
        return ""
    last = {}
    for name, key in LOSSES.items():
        values = [value for _, value in points(read_metrics(alone[name] / "stage1" / "metrics.jsonl"), key)]
        last[name] = fmean(values[-max(1, round(CONVERGED * len(values))) :])
    parts = f"contrastive {last['contrastive']:.4g} / squared error {last['mse']:.4g}"
    ratio = last["contrastive"] / last["mse"]
    return f"a_r / a_a = {ratio:.3g}: {parts}, each trained alone (mean of the last {CONVERGED:.0%} of its steps)"


def _slug(name: str) -> str:
    """A folder name: letters, digits and single dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.replace(",", "")).split())
