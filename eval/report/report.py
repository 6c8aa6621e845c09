"""`python -m eval report --run RUN [RUN ...]`: one run's numbers and pictures, beside the paper's and other runs'.

Writes report.json (flat keys), report.md, report.html (one file, no external asset) and figures/*.png into the first
run's folder and prints the table. What was not measured or not run is shown as such.
"""

import argparse
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_mix.demo.scene_prompts import SKILLS
from eval.config import PARTS
from eval.paper_values import tables
from eval.report.figures import SKILL_TITLES, bits, forgetting, losses, mix, svg, write_figures
from eval.report.run_folder import TRAINING_PHASES, RunData, load_run
from eval.report.table import Section, apart, as_markdown, compare, labels, print_table, protocols
from eval.scores import Score
from um3.core.errors import UserError
from um3.core.files import write_json, write_text
from um3.core.log import setup_logging
from um3.core.progress import format_seconds
from um3.core.provenance import commit, machine, versions

TEMPLATE = "report_template.html"
# What a reader wants to know first: the first key with this ending, what it is called, and what it means.
HEADLINES = (
    ("skills/mean", "drawings right", "of the pictures show all that their prompt demands"),
    ("_captions/exact_match", "captions right", "of the captions of held-out images are right to the word"),
    ("_reconstruction_stage2/psnr", "reconstruction", "between a held-out image and what its codes give back"),
    ("_classification/probe_cls_mean", "linear probe", "of held-out digits told by a linear layer on the features"),
    ("_retrieval/image_to_text", "retrieval", "of images find their own caption among a hundred"),
    ("um3_prose/bits_per_byte", "bits per byte", "to write down held-out prose (8 without a model)"),
    ("_generation/clipscore_qlip", "prompt match", "cosine of drawings and their prompts, by the tokenizer's towers"),
)
NUM_HEADLINES = 6
TILE = 96  # pixels on the page of the side of a small picture


def main(arguments: Sequence[str]) -> None:
    """Write the report of one or several runs."""
    parser = argparse.ArgumentParser(prog="python -m eval report", description="Numbers and pictures of a run.")
    parser.add_argument("--run", nargs="+", required=True, help="run folder, such as runs/demo; more to compare with")
    options = parser.parse_args(arguments)
    setup_logging()
    runs = [load_run(folder) for folder in options.run]
    write_report(runs)


def write_report(runs: Sequence[RunData]) -> None:
    """report.json, .md, .html and figures/ in the first run's folder; the table of all runs on the terminal."""
    run = runs[0]
    if len({other.folder.resolve() for other in runs}) < len(runs):
        raise UserError("the same run is given twice; name each once")
    figures = write_figures(run, run.folder / "figures")
    sections = compare(runs)
    write_json(run.folder / "report.json", as_json(runs, sections=sections))
    write_text(run.folder / "report.md", as_markdown(runs, sections=sections))
    write_text(run.folder / "report.html", as_html(runs, sections=sections))
    print_table(runs, sections=sections)
    written = f"{run.folder / 'report.html'}  ·  report.md  ·  report.json"
    print(f"{written}  ·  {len(figures)} pictures in {run.folder / 'figures'}")


def as_json(runs: Sequence[RunData], *, sections: Sequence[Section]) -> dict[str, Any]:
    """Everything with a number, flat: `values` of the first run by key, `others` by run folder; every value with its n,
    seed, interval and protocol hash, whose settings `protocols` holds. Values of one key under different hashes must
    not be compared: `not_comparable` names them."""
    run = runs[0]
    return {
        "run": run.name,
        "values": _values(run),
        "others": {str(other.folder): _values(other) for other in runs[1:]},
        "protocols": protocols(runs),
        "not_comparable": apart(sections),
        "phases": {
            phase: {key: record.get(key) for key in ("seconds", "peak_memory_gib", "steps", "processes", "commit")}
            for phase, record in (run.phases | run.parts).items()
        },
        "not_run": [name for name in (*TRAINING_PHASES, *PARTS) if name not in run.phases | run.parts],
        "codes": run.codes,
        "config": {name: record.get("config") for name, record in (run.phases | run.parts).items()},
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def _values(run: RunData) -> dict[str, dict[str, Any]]:
    return {key: {k: v for k, v in score.to_dict().items() if k != "protocol"} for key, score in run.scores.items()}


def as_html(runs: Sequence[RunData], *, sections: Sequence[Section]) -> str:
    """The page: one file, images as data URIs."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    run = runs[0]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    curves, mixed, forgotten, code_bits = losses(run), mix(run), forgetting(run), bits(run)
    return environment.get_template(TEMPLATE).render(
        run=run,
        labels=labels(runs),
        sections=sections,
        protocols=protocols(runs),
        apart=apart(sections),
        prompts=run.samples("language").get("prompts", {}),
        headlines=headlines(run),
        large=any(array.shape[1] > TILE for arrays in run.images.values() for array in arrays.values()),
        hero=_png_uri(run.folder / "figures" / "hero.png"),
        hero_dark=_png_uri(run.folder / "figures" / "hero_dark.png"),
        skills=_skills(run),
        drawings=_drawings(run),
        captions=_captions(run),
        reconstructions=_reconstructions(run),
        bits=Markup(svg(code_bits)) if code_bits else None,
        curves=Markup(svg(curves)) if curves else None,
        mix=Markup(svg(mixed)) if mixed else None,
        forgetting=Markup(svg(forgotten)) if forgotten else None,
        paper_tables=tables(),
        cloze=run.samples("language").get("cloze", [])[:4],
        phases=_phases(run),
        commit=commit(),
        versions=versions(),
        machine=machine(),
    )


def headlines(run: RunData) -> list[tuple[Score, str, str]]:
    """The values a reader wants first, with a name and a meaning."""
    found = []
    for ending, name, meaning in HEADLINES:
        scores = [s for key, s in run.scores.items() if key.endswith(ending) and s.value is not None]
        found += [(score, name, meaning) for score in scores[:1]]
    return found[:NUM_HEADLINES]


def _skills(run: RunData, *, count: int = 10) -> list[dict[str, Any]]:
    images, samples = run.images.get("generation", {}).get("skills"), run.samples("generation").get("skills", [])
    if images is None:
        return []
    return [
        {
            "title": SKILL_TITLES[skill],
            "score": run.scores.get(f"skills/{skill}"),
            "tiles": [
                {"image": data_uri(images[i]), "passed": sample["passed"], "prompt": sample["prompt"]}
                | {"unmet": [demand for demand, met in sample["demands_met"].items() if not met]}
                for i, sample in enumerate(samples)
                if sample["skill"] == skill
            ][:count],
        }
        for skill in SKILLS
    ]


def _drawings(run: RunData, *, count: int = 15) -> dict[str, list[dict[str, Any]]]:
    """Drawings for held-out captions with the real image of each."""
    images, samples = run.images.get("generation", {}), run.samples("generation").get("captions", {})
    return {
        source: [
            {"drawn": data_uri(drawn), "real": data_uri(real), "prompt": sample["prompt"]}
            for drawn, real, sample in zip(
                images[f"{source}_drawn"][:count], images[f"{source}_real"][:count], given[:count], strict=True
            )
        ]
        for source, given in samples.items()
    }


def _captions(run: RunData, *, count: int = 16) -> dict[str, list[dict[str, Any]]]:
    images = run.images.get("captions", {})
    return {
        source: [{"image": data_uri(image), **sample} for image, sample in zip(images[source], given, strict=True)][
            :count
        ]
        for source, given in run.samples("captions").items()
    }


def _reconstructions(run: RunData, *, count: int = 12) -> dict[str, list[dict[str, Any]]]:
    images, stages = run.images.get("tokenizer", {}), run.samples("tokenizer").get("stages", [])
    return {
        source: [
            {
                "title": kind.replace("stage", "stage "),
                "score": run.scores.get(f"{source}_reconstruction_{kind}/psnr"),
                "images": [data_uri(image) for image in images.get(f"{source}_{kind}", [])[:count]],
            }
            for kind in ("original", *stages)
        ]
        for source in run.source_names("tokenizer", suffix="_original")
    }


def _phases(run: RunData) -> list[dict[str, Any]]:
    """Duration, memory and size of every phase, in the order of the pipeline; empty where it has not run."""
    records = run.phases | {f"eval: {part}": record for part, record in run.parts.items()}
    names = (*TRAINING_PHASES, *(f"eval: {part}" for part in PARTS))
    return [
        {
            "name": name,
            "duration": format_seconds(record["seconds"]) if "seconds" in record else "",
            "memory": f"{record['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in record else "",
            "steps": record.get("steps", ""),
            "commit": record.get("commit", ""),
            "ran": bool(record),
        }
        for name in names
        for record in [records.get(name, {})]
    ]


def data_uri(image: NDArray) -> str:
    """A uint8 (H, W, 3) image in a URI: as it is, or, a large one, as a JPEG no larger than it is shown."""
    from PIL import Image

    buffer, picture = io.BytesIO(), Image.fromarray(image)
    large = max(picture.size) > TILE
    if large:
        picture.thumbnail((2 * TILE, 2 * TILE))
        picture.save(buffer, format="JPEG", quality=88)
    else:
        picture.save(buffer, format="PNG", optimize=True)
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _png_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
