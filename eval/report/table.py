"""Any number of runs beside the paper: the numbers that may be compared on one line, on a terminal and in Markdown."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eval.paper_values import REFERENCES, tables
from eval.report.figures import SKILL_TITLES
from eval.report.run_folder import RunData
from eval.scores import Score
from um3.core.config import differences

TITLES = {
    "tokenizer": "Tokenizer",
    "captions": "Captions",
    "generation": "Drawings",
    "language": "Language",
}
METRIC_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "bits_per_image": "bits per image",
    "fid": "FID",
    "rfid": "rFID",
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
    "clipscore": "CLIPScore",
    "clipscore_qlip": "CLIPScore, QLIP's towers",
    "clipscore_qlip_real": "the same, real images",
    "exact_match": "exact match",
    "exact_match_any": "exact match, any reference",
    "image_to_text": "image → text, top 1",
    "text_to_image": "text → image, top 1",
    "zero_shot": "zero-shot accuracy",
    "probe_cls": "linear probe, class token",
    "probe_mean": "linear probe, mean of patches",
    "probe_cls_mean": "linear probe, both",
    "read_back": "read back by the checker",
    "bits_per_byte": "bits per byte",
    "word_perplexity": "word perplexity",
    "mean": "mean of the six",
    **SKILL_TITLES,
}


MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in "\\|[]`*_"} | {"<": "&lt;"})
CELL_WIDTH, OTHER_WIDTH = 26, 84  # characters on a terminal: of a run's column, of all the others


class Cell(NamedTuple):
    """A printed value, and its 95 % interval where it has one."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


class Line(NamedTuple):
    """One line of the table: one metric under one protocol. `cells` holds the value of every run, a dash for none.

    `counts` and `seeds` are the runs' n and seed, once if all agree; `protocol` is the hash. `differs` says how the
    protocol differs from that of the metric's first line, empty on that line.
    """

    key: str
    name: str
    cells: list[Cell]
    counts: str
    seeds: str
    protocol: str
    paper: str
    note: str
    differs: str

    @property
    def measured(self) -> bool:
        """True if any run has a value."""
        return bool(self.protocol)


class Block(NamedTuple):
    """The lines of one task; `reference` where the paper column is not the section's."""

    title: str
    reference: str
    lines: list[Line]

    @property
    def measured(self) -> list[Line]:
        """The lines with a value in any run."""
        return [line for line in self.lines if line.measured]


class Section(NamedTuple):
    """A part of the evaluation with what the paper column refers to; no blocks if it has not run."""

    part: str
    title: str
    reference: str
    blocks: list[Block]

    @property
    def about(self) -> str:
        """What stands beside the title."""
        return f"paper: {self.reference}" if self.blocks else "not measured: run make eval"


def compare(runs: Sequence[RunData]) -> list[Section]:
    """The metrics of all runs, by part and task, in the order in which they were measured.

    A line never holds numbers of two protocols: what a run measured in another way has a line of its own.
    """
    sections = []
    for part, title in TITLES.items():
        rows: dict[str, Score] = {}
        for run in runs:
            for score in run.rows_by_part.get(part, []):
                rows.setdefault(score.key, score)
        blocks: dict[str, Block] = {}
        for score in rows.values():
            own = reference(score.task) if score.task in REFERENCES else ""
            block = blocks.setdefault(score.task, Block(task_title(score.task), own, []))
            block.lines.extend(_lines(score, runs=runs))
        sections.append(Section(part, title, reference(part), list(blocks.values())))
    return sections


def _lines(first: Score, *, runs: Sequence[RunData]) -> Iterator[Line]:
    """The lines of a metric: one per protocol, or a single one without a value."""
    found = [run.scores.get(first.key) for run in runs]
    measured = [score for score in found if score is not None and score.value is not None]
    by_protocol = {score.protocol_hash: score for score in reversed(measured)}
    hashes = list(dict.fromkeys(score.protocol_hash for score in measured)) or [""]
    for protocol in hashes:
        own = [score for score in measured if score.protocol_hash == protocol]
        stands_for = by_protocol.get(protocol, first)
        yield Line(
            key=first.key,
            name=metric_name(first.metric),
            cells=[
                Cell(score.shown(), score.shown_interval()) if score in own and score is not None else Cell("–")
                for score in found
            ],
            counts=" / ".join(map(str, dict.fromkeys(score.n for score in own))),
            seeds=" / ".join(map(str, dict.fromkeys(score.seed for score in own))),
            protocol=protocol,
            paper=first.shown(first.paper) if first.paper is not None else "",
            note=stands_for.note,
            differs="" if protocol == hashes[0] else _difference(by_protocol[hashes[0]], stands_for),
        )


def _difference(first: Score, other: Score) -> str:
    old, new = ({"version": score.version} | score.protocol for score in (first, other))
    return "; ".join(differences(old, new))


def protocols(runs: Sequence[RunData]) -> dict[str, dict[str, Any]]:
    """The settings behind every hash of the table."""
    scores = [score for run in runs for score in run.scores.values() if score.value is not None]
    return {score.protocol_hash: {"version": score.version} | score.protocol for score in scores}


def apart(sections: Sequence[Section]) -> list[str]:
    """What may not be compared, and why: a sentence for each way in which protocols differ."""
    keys: dict[str, list[str]] = {}
    for line in (line for section in sections for block in section.blocks for line in block.lines):
        if line.differs:
            keys.setdefault(line.differs, []).append(line.key)
    return [f"{', '.join(dict.fromkeys(found))} ({differs})" for differs, found in keys.items()]


def absent(sections: Sequence[Section]) -> list[Line]:
    """The metrics without a value in any run."""
    return [line for section in sections for block in section.blocks for line in block.lines if not line.measured]


def labels(runs: Sequence[RunData]) -> list[str]:
    """The runs' names; their folders where two are named alike."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def reference(name: str) -> str:
    """Whose values the paper column shows, and on which data."""
    return f"{REFERENCES[name].system}, {REFERENCES[name].data}"


def metric_name(metric: str) -> str:
    """`frechet_distance[random-features]` -> `Frechet distance, random-features`."""
    if metric.startswith("frechet_distance["):
        return f"Frechet distance, {metric.removeprefix('frechet_distance[').removesuffix(']')}"
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def task_title(task: str) -> str:
    """`scenes_reconstruction_stage1` -> `reconstruction · scenes · stage 1`."""
    for kind in ("reconstruction", "retrieval", "bits", "classification", "captions", "generation"):
        source, found, stage = task.partition(f"_{kind}")
        if found:
            parts = [kind.replace("generation", "drawings"), source, stage.strip("_").replace("stage", "stage ")]
            return " · ".join(part for part in parts if part)
    names = {"skills": "six skills", "um3_prose": "held-out prose", "um3_prose_cloze": "which sentence comes next"}
    return names.get(task, task)


def print_table(runs: Sequence[RunData], *, sections: Sequence[Section]) -> None:
    """The table on the terminal, as many runs side by side as there is room for."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    terminal = Console().is_terminal
    console = Console(width=None if terminal else OTHER_WIDTH + CELL_WIDTH * len(runs))
    at_once = max(1, (console.width - OTHER_WIDTH) // CELL_WIDTH)
    for start in range(0, len(runs), at_once):
        shown = slice(start, start + at_once)
        grid = Table(box=None, pad_edge=False, header_style="dim")
        grid.add_column("")
        for label in labels(runs)[shown]:
            grid.add_column(escape(label), justify="right")
        for title in ("paper", "n", "seed", "protocol"):
            grid.add_column(title, justify="right", style="dim")
        for section in sections:
            grid.add_row(f"[bold]{section.title}[/] [dim]{section.about}[/]")
            for block in section.blocks:
                if block.measured:
                    own = f" [dim]paper: {block.reference}[/]" if block.reference else ""
                    grid.add_row(f"  {escape(block.title)}{own}")
                for line in block.measured:
                    cells = [escape(str(cell)) for cell in line.cells[shown]]
                    name = f"    {escape(line.name)}{' ≠' if line.differs else ''}"
                    grid.add_row(name, *cells, line.paper, line.counts, line.seeds, line.protocol)
        console.print(grid)
    for sentence in apart(sections):
        console.print(f"≠ not comparable, so on a line of its own: {escape(sentence)}")
    if missing := ", ".join(line.key for line in absent(sections)):
        console.print(f"[dim]without a value (the report says why): {escape(missing)}[/]")
    console.print(
        "[dim]In brackets: 95 % bootstrap intervals over the items. The paper's values belong to its data and[/]"
    )
    console.print("[dim]scale; at demo scale they are not comparable.[/]")


def as_markdown(runs: Sequence[RunData], *, sections: Sequence[Section]) -> str:
    """The table, what is missing and the protocols behind the hashes."""
    header = ["", *labels(runs), "paper", "n", "seed", "protocol"]
    lines = [f"# {' · '.join(labels(runs))}", ""]
    lines += ["In brackets: 95 % bootstrap intervals over the items. A line holds numbers of one protocol only.", ""]
    for section in sections:
        lines += [f"## {section.title}", "", f"{section.about[:1].upper()}{section.about[1:]}.", ""]
        if any(block.measured for block in section.blocks):
            lines += [_row(header), _row(["---", *["--:"] * (len(header) - 1)])]
        for block in section.blocks:
            if block.measured:
                own = f" (paper: {block.reference})" if block.reference else ""
                lines.append(_row([f"**{_escaped(block.title)}**{own}", *[""] * (len(header) - 1)]))
            for line in block.measured:
                cells = [_escaped(str(cell)) for cell in line.cells]
                name = f"{_escaped(line.name)}{' ≠' if line.differs else ''}"
                lines.append(_row([name, *cells, line.paper, line.counts, line.seeds, f"`{line.protocol}`"]))
        lines.append("")
    notes = {
        "Not comparable, so on lines of their own": [_escaped(sentence) for sentence in apart(sections)],
        "Not measured": [f"`{line.key}`: {_escaped(line.note)}" for line in absent(sections)],
        "Protocols": [f"`{name}`: `{json.dumps(settings)}`" for name, settings in protocols(runs).items()],
    }
    for title, sentences in notes.items():
        lines += [f"## {title}", "", *[f"- {sentence}" for sentence in sentences], ""] if sentences else []
    for table in tables():
        lines += [f"## The paper: {table.title}", "", _row(["", *table.columns])]
        lines += [
            _row(["---", *["--:"] * len(table.columns)]),
            *[_row([name, *cells]) for name, cells in table.rows],
            "",
        ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text from outside, in a table's cell: no new cell, line, link or tag."""
    return " ".join(text.split()).translate(MARKDOWN)
