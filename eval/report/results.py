"""The tables of a report: the metrics of several runs beside the paper's values.

A row never holds values of two protocols. A run that measured a metric in another way has a row of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from eval.config import PARTS
from eval.paper_values import AS_PRINTED, PAPER_ITEMS, REFERENCES, TABLES
from eval.report.run_folder import TRAINING_PHASES, RunData
from eval.report.samples import SKILL_TITLES
from eval.report.table import Cell, Row, Table
from eval.scores import Score
from um3.core.config import differences
from um3.core.progress import format_seconds
from um3.core.text import valid_text

TITLES = {"tokenizer": "Tokenizer", "captions": "Captions", "generation": "Generated images", "language": "Language"}
TITLES["vqa"] = "Questions about images"
ACRONYMS = ("psnr", "ssim", "lpips", "fid", "meteor", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
METRIC_NAMES = {
    "rfid": "rFID",
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "cider": "CIDEr",
    "clipscore": "CLIPScore",
    "clipscore_qlip": "CLIPScore, QLIP's towers",
    "clipscore_qlip_real": "the same, real images",
    "clipscore_qlip_other": "the same, prompts of other images",
    "nearest_training": "bits equal to the nearest training image",
    "nearest_training_real": "the same, real images",
    "cider_other_image": "CIDEr, captions of other images",
    "clipscore_judge": "CLIPScore, the judge's towers",
    "exact_match_any": "exact match, any reference",
    "image_to_text": "image → text, top 1",
    "text_to_image": "text → image, top 1",
    "zero_shot": "zero-shot accuracy",
    "probe_cls": "linear probe, class token",
    "probe_mean": "linear probe, mean of patches",
    "probe_cls_mean": "linear probe, both",
    "read_back": "read back by the checker",
    "mean": "mean of the six",
    **{metric: metric.upper().replace("_", "-") for metric in ACRONYMS},
    **SKILL_TITLES,
}
TASK_NAMES = {"skills": "six skills", "um3_prose": "validation prose", "um3_prose_cloze": "which sentence comes next"}
TASK_KINDS = ("reconstruction", "retrieval", "bits", "classification", "captions", "generation")
NO_VALUE = Cell("–")
SETTING_COLUMNS = ("n", "seed", "protocol")


def result_tables(runs: Sequence[RunData]) -> list[Table]:
    """A table per part of the evaluation, the metrics in the order in which they were measured.

    The paper's value stands beside a row only where `like_the_paper` holds; without such a row it has no column.
    """
    tables = [_part_table(part, title, runs=runs) for part, title in TITLES.items()]
    place = len(runs)
    columns = [*labels(runs), "paper", *SETTING_COLUMNS]
    rows = [row for table in tables for row in table.rows if row.cells]
    if not any(row.cells[place].value for row in rows):
        columns.pop(place)
        for table in tables:
            table.rows[:] = [row._replace(cells=[*row.cells[:place], *row.cells[place + 1 :]]) for row in table.rows]
    # Nobody expects images of a language model, and make eval asks no questions about images.
    unexpected = TITLES.values() if all(run.is_language_only for run in runs) else [TITLES["vqa"]]
    kept = [table for table in tables if table.rows or table.missing or table.title not in unexpected]
    return [replace(table, columns=columns) for table in kept]


def _part_table(part: str, title: str, *, runs: Sequence[RunData]) -> Table:
    """The table of a part, with the paper's column; its columns are named later."""
    scores: dict[str, Score] = {}
    for score in (score for run in runs for score in run.rows_by_part.get(part, [])):
        scores.setdefault(score.key, score)
    table = Table(title, [], num_values=len(runs), note="" if scores else "not measured: run make eval")
    for task in dict.fromkeys(score.task for score in scores.values()):
        of_task = [score for score in scores.values() if score.task == task]
        measured = [row for score in of_task for row in _rows(score, runs=runs)]
        system, data = REFERENCES.get(task) or REFERENCES.get(part, ("", ""))
        has_paper = any(row.cells[len(runs)].value for row in measured)
        heading = Row(task_title(task, runs[0]), note=f"paper: {system}, {data}" if has_paper else "")
        table.rows.extend([heading, *measured] if measured else [])
        keys = {row.key for row in measured}
        table.missing.update({score.key: score.note for score in of_task if score.key not in keys})
    return table


def like_the_paper(run: RunData, task: str) -> bool:
    """Whether a task has the name of a data set of the paper, and at least as many items."""
    needed = [count for name, count in PAPER_ITEMS.items() if task.startswith(name)]
    return bool(needed) and max(score.n for score in run.scores.values() if score.task == task) >= max(needed)


def _rows(first: Score, *, runs: Sequence[RunData]) -> Iterator[Row]:
    """The rows of a metric: one per protocol under which a run has a value."""
    scores = [run.scores.get(first.key) for run in runs]
    by_protocol: dict[str, list[Score]] = {}
    for score in scores:
        if score is not None and score.value is not None:
            by_protocol.setdefault(score.protocol_hash, []).append(score)
    reference = next(iter(by_protocol.values()), [first])[0]
    for protocol, measured in by_protocol.items():
        values = [Cell(s.shown(), s.shown_interval()) if s is not None and s in measured else NO_VALUE for s in scores]
        counts = " / ".join(dict.fromkeys(_count(score) for score in measured))
        seeds = " / ".join(dict.fromkeys(str(score.seed) for score in measured))
        measured_by = [run for run, score in zip(runs, scores, strict=True) if score is not None and score in measured]
        is_like = first.paper is not None and all(like_the_paper(run, first.task) for run in measured_by)
        settings = _settings(measured[0])
        paper = Cell(first.shown(first.paper) if is_like else "")
        yield Row(
            metric_name(first.metric),
            [*values, paper, Cell(counts), Cell(seeds), Cell(protocol, settings=settings)],
            note=measured[0].note,
            key=first.key,
            differs="; ".join(differences(_settings(reference), settings)),
        )


def _count(score: Score) -> str:
    return f"{score.n} ({score.skipped} skipped)" if score.skipped else str(score.n)


def _settings(score: Score) -> dict[str, Any]:
    return {"version": score.version} | score.protocol


def protocols(runs: Sequence[RunData]) -> dict[str, dict[str, Any]]:
    """The settings behind every protocol hash of the tables."""
    scores = [score for run in runs for score in run.scores.values() if score.value is not None]
    return {score.protocol_hash: _settings(score) for score in scores}


def not_comparable(results: Sequence[Table]) -> dict[str, str]:
    """The differences between protocols: the keys of the metrics, comma-separated -> how their protocols differ."""
    keys: dict[str, list[str]] = {}
    for row in (row for table in results for row in table.rows if row.differs):
        keys.setdefault(row.differs, []).append(row.key)
    return {", ".join(dict.fromkeys(same)): differs for differs, same in keys.items()}


def paper_tables() -> list[Table]:
    """The paper's main results as it prints them: most shares times 100, an empty cell without a value."""

    def cell(key: str, value: float | None) -> Cell:
        return Cell("" if value is None else f"{value:g}" if key in AS_PRINTED else f"{100 * value:.4g}")

    tables = []
    for title, columns, systems in TABLES:
        rows = [Row(name, [cell(key, values.get(key)) for key in columns]) for name, values in systems.items()]
        tables.append(Table(title, list(columns.values()), rows))
    return tables


def phase_table(run: RunData) -> Table:
    """Duration, memory and steps of every phase, in the order of the pipeline."""
    records = run.phases | {f"eval: {part}": content.record for part, content in run.parts.items()}
    rows = []
    for name in (*TRAINING_PHASES, *(f"eval: {part}" for part in PARTS)):
        record = records.get(name, {})
        duration = format_seconds(record["seconds"]) if "seconds" in record else "" if record else "not run"
        memory = f"{record['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in record else ""
        cells = (duration, memory, str(record.get("steps", "")), str(record.get("commit", "")))
        rows.append(Row(name, list(map(Cell, cells))))
    return Table("Phases", ["duration", "peak memory", "steps", "commit"], rows, num_values=4)


def labels(runs: Sequence[RunData]) -> list[str]:
    """The names of the runs; their folders if two runs have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [valid_text(str(run.folder)) for run in runs]


def metric_name(metric: str) -> str:
    """`frechet_distance[random-features]` -> `Frechet distance, random-features`."""
    if metric.startswith("frechet_distance["):
        return f"Frechet distance, {metric.removeprefix('frechet_distance[').removesuffix(']')}"
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def task_title(task: str, run: RunData) -> str:
    """`scenes_reconstruction_stage1` -> `reconstruction · scenes · stage 1`."""
    for kind in TASK_KINDS:
        source, separator, stage = task.partition(f"_{kind}")
        if separator:
            parts = [kind, run.source_title(source), stage.strip("_").replace("stage", "stage ")]
            return " · ".join(part for part in parts if part)
    return TASK_NAMES.get(task, task)
