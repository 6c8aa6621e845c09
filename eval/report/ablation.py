"""`python -m eval ablation --table FILE --config FILE --run FOLDER`: train and measure the rows of an ablation.

Every row is a run of its own inside the run folder (`eval.report.ablation_rows`). Therefore a stopped row resumes, and
a row that is up to date is skipped.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from eval.report.ablation_rows import PHASES, Ablation, Place, RowRun, costs, start
from eval.report.evidence import verdict_lines
from eval.report.figures import curves, points, save
from eval.report.table import Cell, Row, Table, markdown
from eval.scores import Score, read_scores
from um3.core.commands import command_parser, positive
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import folder_lock, write_json, write_text
from um3.core.metrics import read_metrics
from um3.core.text import printable

CONVERGED = 0.1
"""A loss at convergence is the mean over this last share of the logged steps."""
LOSSES = {"contrastive": "train/contrastive", "mse": "train/mse"}


def main(arguments: Sequence[str]) -> None:
    """Make the rows that are missing or stale, then print and write the table."""
    parser = command_parser("python -m eval ablation", "Train and measure the rows of an ablation.", config="required")
    parser.add_argument("--table", required=True, help="YAML file of the table, such as configs/ablations/weights.yaml")
    parser.add_argument("--run", required=True, help="folder for the runs of the rows and for the table")
    parser.add_argument("--base", default="", help="run whose models and codes the rows start from")
    parser.add_argument("--processes", type=positive, default=1, help="training processes of a run (default 1)")
    parser.add_argument("--seed", type=int, help="only this seed of every row, and no table: seeds can run at once")
    parser.add_argument("--alone", action="store_true", help="only the rows with a single loss, and their ratio")
    options = parser.parse_intermixed_args(arguments)
    ablation = load_config(Ablation, path=options.table)
    if options.alone:
        ablation.rows = [row for row in ablation.rows if row.alone]
        if not ablation.rows:
            raise UserError(f"{options.table} has no row with a single loss; set `alone` in one, or omit --alone")
    if options.seed is not None:  # every phase locks its own folder
        if options.seed not in range(ablation.seeds):
            seeds = f"the seeds 0 to {ablation.seeds - 1}" if ablation.seeds > 1 else "one seed, 0"
            raise UserError(f"{options.table} has {seeds}; set --seed to one of them")
        _run_rows(ablation, seeds=[options.seed], options=options)
        print(f"seed {options.seed} of every row is measured; run the command without --seed for the table")
        return
    with folder_lock(options.run):
        _make_table(ablation, options=options)


def _run_rows(
    ablation: Ablation, *, seeds: Iterable[int], options: argparse.Namespace
) -> dict[str, list[dict[str, Score]]]:
    """Run and measure what is missing or stale; the scores by row, by seed, by key."""
    runs = {row.name: ablation.folders(row, run=Path(options.run)) for row in ablation.rows}
    questions, scores = Path(options.run) / "questions", dict[str, list[dict[str, Score]]]()
    if any(row.llava for row in ablation.rows):
        command = ["data_mix", "questions", f"output_dir={questions}", *ablation.questions]
        start(command, output=questions / "annotations.json", what="writing the questions")
    # All rows are measured on the validation images of the first row or of the base run, whatever they train on.
    first = ablation.rows[0]
    for number, row in enumerate(ablation.rows, start=1):
        for seed in seeds:
            run, seeded = runs[row.name][seed], f", seed {seed}" if ablation.seeds > 1 else ""
            print(printable(f"row {number} of {len(ablation.rows)}: {row.name}{seeded}"), flush=True)
            places = [Place(str(runs[other.name][seed]), ablation.phases(other)) for other in ablation.lineage(row)]
            RowRun(
                row=row,
                phases=ablation.phases(row),
                places=[*places, Place(options.base, PHASES)],
                config=options.config,
                processes=options.processes,
                overrides=options.overrides,
                seed=seed if seeded else None,
                images_of=options.base if first.stage1 is None else str(runs[first.name][seed]),
                questions=str(questions),
            ).run()
            rows = [score for name in row.results for score in read_scores(run / "eval" / f"{name}.json")]
            rows += costs(run, row)
            scores.setdefault(row.name, []).append({score.key: score for score in rows})
    return scores


def _make_table(ablation: Ablation, *, options: argparse.Namespace) -> None:
    path = Path(options.run) / ("balance.md" if options.alone else "table.md")
    runs = {row.name: ablation.folders(row, run=path.parent) for row in ablation.rows}
    scores = _run_rows(ablation, seeds=range(ablation.seeds), options=options)
    table = result_table(ablation, scores=scores)
    lines = [ablation.title, "", *markdown(table)]
    if verdicts := verdict_lines(Path(options.table).stem, table):
        lines += ["", *verdicts]
    if ratio := balance({row.alone: runs[row.name][0] for row in ablation.rows if row.alone}):
        lines += ["", ratio]
    write_text(path, "\n".join(["# " + lines[0], *lines[1:]]) + "\n")
    as_json = {key: [{k: score.to_dict() for k, score in seed.items()} for seed in of] for key, of in scores.items()}
    write_json(path.with_suffix(".json"), as_json)
    print("\n".join(map(printable, [*lines, path])))
    if ablation.curves:
        metrics = {}
        for row in ablation.rows:
            last = [phase for phase in row.phases if phase != "codes"][-1]
            metrics[row.name] = [read_metrics(run / last / "metrics.jsonl") for run in runs[row.name]]
        panels = {
            title: {name: [points(rows, key) for rows in of_seeds] for name, of_seeds in metrics.items()}
            for key, title in ablation.curves.items()
        }
        print(save(curves(panels), path.with_name("curves.png")))


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
