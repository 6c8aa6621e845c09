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
from typing import Any, Literal

from data_mix.sources.image_sources import ImageSourceConfig
from eval.report.figures import curves, points, save
from eval.report.table import Cell, Row, Table, markdown
from eval.scores import Score, read_scores
from eval.tasks.validation_data import trained_on
from um3.core.commands import command_parser
from um3.core.config import load_config
from um3.core.errors import Terminated, UserError
from um3.core.files import folder_lock, write_json, write_text
from um3.core.metrics import read_metrics
from um3.core.ranges import PositiveInt
from um3.core.text import printable

CONVERGED = 0.1
"""A loss at convergence is the mean over this last share of the logged steps."""
PHASES = ("stage1", "stage2", "um3")
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
    def parts(self) -> tuple[str, ...]:
        """The parts of the evaluation that measure the row."""
        return ("tokenizer",) if self.um3 is None else ("language", "captions", "generation")


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
                sizes = f"{len(row.paper)} values of the paper for {len(self.columns)} columns"
                raise ValueError(f"row '{row.name}' has {sizes}")

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
    parser.add_argument("--alone", action="store_true", help="only the rows with a single loss, and their ratio")
    options = parser.parse_intermixed_args(arguments)
    ablation = load_config(Ablation, path=options.table)
    if options.alone:
        ablation.rows = [row for row in ablation.rows if row.alone]
        if not ablation.rows:
            raise UserError(f"{options.table} has no row with a single loss; set `alone` in one, or omit --alone")
    with folder_lock(options.run):
        _make_table(ablation, options=options)


def _make_table(ablation: Ablation, *, options: argparse.Namespace) -> None:
    path = Path(options.run) / ("balance.md" if options.alone else "table.md")
    runs = {row.name: ablation.folders(row, run=path.parent) for row in ablation.rows}
    first, scores = runs[ablation.rows[0].name][0], dict[str, list[dict[str, Score]]]()
    for number, row in enumerate(ablation.rows, start=1):
        # All rows are measured on the validation images of the first row or of the base run, whatever they train on.
        images = str(first) if row.um3 is None else options.base
        for seed, run in enumerate(runs[row.name]):
            seeded = f", seed {seed}" if ablation.seeds > 1 else ""
            print(printable(f"row {number} of {len(ablation.rows)}: {row.name}{seeded}"), flush=True)
            after = str(runs[row.after][seed]) if row.after else ""
            places = {"{after}": after, "{text}": f"{after}/um3-export", "{base}": options.base}
            settings = [f"loop.seed={seed}"] * bool(seeded)
            _make_row(row, run=run, settings=settings, places=places, images_of=images, options=options)
            rows = [score for part in row.parts for score in read_scores(run / "eval" / f"{part}.json")]
            scores.setdefault(row.name, []).append({score.key: score for score in rows})
    lines = [ablation.title, "", *markdown(result_table(ablation, scores=scores))]
    if ratio := balance({row.alone: runs[row.name][0] for row in ablation.rows if row.alone}):
        lines += ["", ratio]
    write_text(path, "\n".join(["# " + lines[0], *lines[1:]]) + "\n")
    as_json = {key: [{k: score.to_dict() for k, score in seed.items()} for seed in of] for key, of in scores.items()}
    write_json(path.with_suffix(".json"), as_json)
    print("\n".join(map(printable, [*lines, path])))
    if ablation.curves:
        metrics = {}
        for row in ablation.rows:
            last = [phase for phase in PHASES if getattr(row, phase) is not None][-1]
            metrics[row.name] = [read_metrics(run / last / "metrics.jsonl") for run in runs[row.name]]
        panels = {
            title: {name: [points(rows, key) for rows in of_seeds] for name, of_seeds in metrics.items()}
            for key, title in ablation.curves.items()
        }
        print(save(curves(panels), path.with_name("curves.png")))


def _make_row(
    row: AblationRow, *, run: Path, settings: list[str], places: dict[str, str], images_of: str, options: Any
) -> None:
    """Train the phases of the row in the folder `run` and measure them on the images of the run `images_of`."""
    overrides = {
        "stage1": options.overrides,
        "stage2": [f"init_from={run}/stage1/model"],
        "um3": ["visual_tokenizer={base}/stage2/model", "data.codes={base}/codes", *options.overrides],
    }
    phases = {phase: [*overrides[phase], *own] for phase in PHASES if (own := getattr(row, phase)) is not None}
    text = Path(places["{text}"])
    if any("{text}" in setting for of_phase in phases.values() for setting in of_phase) and not text.exists():
        export = ["um3", "export", f"{places['{after}']}/um3/model", "--out", str(text)]
        _run(export, row=row, output=text / "config.json")
    for phase, of_phase in phases.items():
        for place, path in places.items():
            of_phase = [setting.replace(place, path) for setting in of_phase]
        train = ["train", phase, "--processes", str(options.processes), "--config", options.config]
        train += [f"loop.output_dir={run}/{phase}", *of_phase, *settings]
        _run(train, row=row, output=run / phase / "done.json")
    sources = trained_on(images_of, phase="stage1", key="sources", kind=ImageSourceConfig)
    images = json.dumps([dataclasses.asdict(source) for source in sources])
    evaluate = ["eval", "run", "--config", options.config, f"run={run}", f"images={images}"]
    evaluate.append(f"parts=[{','.join(row.parts)}]")
    _run(evaluate, row=row, output=run / "eval" / f"{row.parts[-1]}.json")


def _run(command: list[str], *, row: AblationRow, output: Path) -> None:
    """Run `python -m COMMAND`, which must write `output`. It gets a stop signal too and may save its state first."""
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

    Of several seeds the table shows the mean and the standard deviation. A column needs a score in one row.
    """
    known = sorted({key for seeds in scores.values() for of_seed in seeds for key in of_seed})
    if unknown := [key for key in ablation.columns if key not in known]:
        raise UserError(f"columns: no run has a score '{unknown[0]}'; use one of {', '.join(known)}")
    rows = []
    for row in ablation.rows:
        cells = []
        for key, paper in zip(ablation.columns, row.paper or [None] * len(ablation.columns), strict=True):
            of_seeds = [of_seed[key] for of_seed in scores[row.name] if key in of_seed]
            values = [score.value for score in of_seeds if score.value is not None]
            shown = of_seeds[0].shown(fmean(values)) if values else "–"
            shown += f" ± {of_seeds[0].shown(stdev(values))}" if len(values) > 1 else ""
            cells.append(Cell(shown, f"(paper {of_seeds[0].shown(paper)})" if values and paper is not None else ""))
        rows.append(Row(row.name, cells))
    return Table(ablation.title, list(ablation.columns.values()), rows, num_values=len(ablation.columns))


def balance(alone: dict[str, Path]) -> str:
    """The paper's rule for the weights (section 3): a_r / a_a is about L_align / L_mse, each trained alone.

    `alone` maps a loss to the run that has this loss only. Empty unless there is a run of each loss.
    """
    if set(alone) != set(LOSSES):
        return ""
    last = {}
    for name, key in LOSSES.items():
        path = alone[name] / "stage1" / "metrics.jsonl"
        values = [value for _, value in points(read_metrics(path), key)]
        if not values or not values[-1]:
            raise UserError(f"{path} has no {key} of the run with this loss alone; delete the run and make it again")
        last[name] = fmean(values[-max(1, round(CONVERGED * len(values))) :])
    parts = f"contrastive {last['contrastive']:.4g} / squared error {last['mse']:.4g}"
    ratio = last["contrastive"] / last["mse"]
    return f"a_r / a_a = {ratio:.3g}: {parts}, each trained alone (mean of the last {CONVERGED:.0%} of its steps)"


def _slug(name: str) -> str:
    """A folder name: letters, digits and single dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.replace(",", "")).split())
