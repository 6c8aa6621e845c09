"""`python -m eval report --run RUN [RUN ...]`: the results of a run, beside the paper's and those of other runs.

Writes report.json (flat keys), report.md, report.html (one file without external assets) and figures/*.png into the
folder of the first run, and prints the table. Metrics that could not be computed are listed with the reason; phases
that have not run are shown as such.
"""

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from eval.config import PARTS
from eval.report import figures
from eval.report.assessment import findings
from eval.report.results import (
    labels,
    like_the_paper,
    not_comparable,
    paper_tables,
    phase_table,
    protocols,
    result_tables,
)
from eval.report.run_folder import TRAINING_PHASES, RunData, load_run
from eval.report.samples import selection_note
from eval.report.table import Table, escaped, markdown, markdown_list, print_tables
from eval.scores import Score
from um3.core.errors import UserError
from um3.core.files import folder_lock, write_json, write_text
from um3.core.log import setup_logging
from um3.core.metrics import commit, machine, versions
from um3.core.text import printable, valid_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report_template.html"
CHARTS = ("bits", "losses", "validation", "mix", "forgetting")  # figures that the page shows as SVG
MARKS = {True: "✓", False: "✗", None: "·"}
INTERVALS = "In brackets: 95 % bootstrap intervals over the items."
# The values at the top of the page: the first key with this ending, its title, and what it means.
HEADLINES = (
    ("skills/mean", "images right", "of the generated images show everything that their prompt demands"),
    ("_captions/exact_match", "captions right", "of the captions of validation images equal the reference"),
    ("_reconstruction_stage2/psnr", "reconstruction", "between a validation image and its reconstruction"),
    ("_captions/cider", "captions", "CIDEr of the captions of validation images, at most 1,000"),
    ("_classification/probe_cls_mean", "linear probe", "of validation digits classified by a linear layer on features"),
    ("_retrieval/image_to_text", "retrieval", "of images find their own caption among a hundred"),
    ("um3_prose/bits_per_byte", "bits per byte", "of validation prose (8 without a model)"),
    ("_generation/clipscore_qlip", "prompt match", "cosine of images and prompts, by the tokenizer's towers"),
)
NUM_HEADLINES = 6
TILE_SIDE = 96  # pixels of a small image on the page


def main(arguments: Sequence[str]) -> None:
    """Write the report of one or several runs."""
    parser = argparse.ArgumentParser(prog="python -m eval report", description="Write the tables and figures of a run.")
    parser.add_argument("--run", nargs="+", required=True, help="run folder, such as runs/demo; more for a comparison")
    options = parser.parse_args(arguments)
    setup_logging()
    write_report([load_run(folder) for folder in options.run])


def write_report(runs: Sequence[RunData]) -> None:
    """Write report.json, .md, .html and figures/ into the first run's folder; print the table of all runs.

    report.json is flat: `values` holds the scores of the first run by key, `others` those of the other runs by folder.
    `protocols` holds the settings behind each protocol hash; values under different hashes must not be compared, and
    `not_comparable` names them.
    """
    run, folder = runs[0], runs[0].folder
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("--run names the same run twice; name each run once")
    records = run.phases | {part: content.record for part, content in run.parts.items()}
    with folder_lock(folder / "figures"):
        run_figures, results = figures.write_figures(run), result_tables(runs)
        found = run.attempt(f"{folder}: what the report says first", findings, run, default=[])
        shared = {
            "findings": found,
            "problems": [valid_text(problem) for run in runs for problem in run.problems],
            "protocols": protocols(runs),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
        }
        differing = [f"{keys} ({differs})" for keys, differs in not_comparable(results).items()]
        fields = ("seconds", "peak_memory_gib", "steps", "processes", "commit")
        only_json = {
            "run": run.name,
            "values": _values(run),
            "others": {valid_text(str(other.folder)): _values(other) for other in runs[1:]},
            "not_comparable": differing,
            "phases": {phase: {name: record.get(name) for name in fields} for phase, record in records.items()},
            "not_run": [name for name in (*TRAINING_PHASES, *PARTS) if name not in records],
            "codes": run.codes,
            "config": {name: record.get("config") for name, record in records.items()},
        }
        write_json(folder / "report.json", only_json | shared | {"findings": [finding._asdict() for finding in found]})
        write_text(folder / "report.md", as_markdown(runs, results=results, **shared))
        write_text(folder / "report.html", as_html(run, results=results, run_figures=run_figures, **shared))
    for finding in found:
        print(printable(f"{MARKS[finding.good]} {finding.text}"))
    print_tables(results)
    missing = ", ".join(key for table in results for key in table.missing)
    lines = [
        *(f"≠ not comparable, therefore in a row of its own: {line}" for line in differing),
        *[f"without a value (the report gives the reasons): {missing}"] * bool(missing),
        *(f"not in the report: {problem}" for problem in shared["problems"]),
        INTERVALS,
        f"{folder / 'report.html'}  ·  report.md  ·  report.json  ·  figures in {folder / 'figures'}",
    ]
    print("\n".join(map(printable, lines)))


def _values(run: RunData) -> dict[str, dict[str, Any]]:
    """Every row by key; `paper` is null where the row is not like the paper's."""
    values = {}
    for key, score in run.scores.items():
        row = {name: value for name, value in score.to_dict().items() if name != "protocol"}
        values[key] = row if like_the_paper(run, score.task) else row | {"paper": None}
    return values


def as_markdown(runs: Sequence[RunData], *, results: Sequence[Table], **shared: Any) -> str:
    """The tables, the metrics without a value, and the protocols behind the hashes."""
    lines = [f"# {' · '.join(labels(runs))}", ""]
    lines += [f"- {MARKS[finding.good]} {escaped(finding.text)}" for finding in shared["findings"]]
    lines += ["", f"{INTERVALS} A row holds values of one protocol only.", ""]
    for table in results:
        lines += [f"## {table.title}", ""]
        lines += [f"{escaped(table.note[:1].upper() + table.note[1:])}.", ""] if table.note else []
        lines += [*markdown(table), ""]
    lines += markdown_list("Not comparable, therefore in rows of their own", not_comparable(results))
    lines += markdown_list("Not measured", {key: why for table in results for key, why in table.missing.items()})
    lines += markdown_list("Files that could not be used", dict(enumerate(shared["problems"], start=1)))
    lines += markdown_list("Protocols", shared["protocols"])
    for table in paper_tables():
        lines += [f"## The paper: {table.title}", "", *markdown(table), ""]
    return "\n".join(lines)


def as_html(run: RunData, *, run_figures: "Mapping[str, Figure]", **shared: Any) -> str:
    """The page: one file, images as data URIs."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    heroes = [run.folder / "figures" / f"{name}.png" for name in ("hero", "hero_dark")]
    html = environment.get_template(TEMPLATE).render(
        run=run,
        title=title_of(run),
        selection_note=selection_note(run.shown),
        headlines=headlines(run),
        large=any(array.shape[1] > TILE_SIDE for part in run.parts.values() for array in part.images.values()),
        heroes=[_uri("png", path.read_bytes()) if path.is_file() else "" for path in heroes],
        charts={name: Markup(figures.svg(figure)) for name in CHARTS if (figure := run_figures.get(name))},
        paper_tables=paper_tables(),
        phases=phase_table(run),
        **shared,
    )
    return valid_text(html)


def title_of(run: RunData) -> str:
    """`UM3 on scenes and digits`, from the sources that were evaluated; the run's name for a language model."""
    if run.is_language_only:
        return run.name
    groups = [*run.shown["reconstructions"], *run.shown["captions"], *run.shown["generated"]]
    sources = list(dict.fromkeys(group.source or group.title for group in groups))
    return f"UM3 on {' and '.join(filter(None, [', '.join(sources[:-1]), sources[-1]]))}" if sources else "UM3"


def headlines(run: RunData) -> list[tuple[Score, str, str]]:
    """The values at the top of the page, each with a title and its meaning."""
    shown: list[tuple[Score, str, str]] = []
    for ending, title, meaning in HEADLINES:
        scores = [score for key, score in run.scores.items() if key.endswith(ending) and score.value is not None]
        has_title = any(known.startswith(title) for _, known, _ in shown)
        shown += [(score, title, meaning) for score in scores[:1] if not has_title]
    return shown[:NUM_HEADLINES]


def data_uri(image_HWC: NDArray) -> str:
    """A uint8 (H, W, 3) image as a URI: a small image as a PNG of its pixels, a large one as a thumbnail in JPEG."""
    from PIL import Image

    buffer, image = io.BytesIO(), Image.fromarray(image_HWC)
    if max(image.size) <= TILE_SIDE:
        image.save(buffer, format="PNG", optimize=True)
        return _uri("png", buffer.getvalue())
    image.thumbnail((2 * TILE_SIDE, 2 * TILE_SIDE))
    image.save(buffer, format="JPEG", quality=88)
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
