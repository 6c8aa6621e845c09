"""`python -m eval geneval images=FOLDER detector=FOLDER clip=FOLDER`: GenEval on drawn images, by its own rules.

`images` is a folder of `eval.benchmarks.generate_images` with layout=geneval, or one of GenEval's own layout. Objects come from a
transformers Mask2Former and colours from a CLIP, image by image, resumable and shared over ranks; or from a file:
`detections=FILE.jsonl` with {"file", "objects": [{"class", "score", "box", "color"}]} a line.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.benchmarks.generated_images import DrawnFolder, has_manifest, read_drawn
from eval.benchmarks.geneval_rules import SETTINGS, TAGS, Demand, Found, Verdict, read_demand, verdict
from eval.command import LeftOut, folder_sha256, run_command, write_result
from eval.paper_values import GENEVAL_LLAMAGEN_QLIP
from eval.records import Judge, NoJudgeError, image_name, judge_name, judgements, supplied
from eval.scores import Measurement, Score, bootstrap, texts_sha256
from um3.core.distributed import is_main
from um3.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

NUM_IMAGES = 4
NEEDS_DETECTOR = (
    "set detector= to facebook/mask2former-swin-small-coco-instance or its folder, or detections=FILE.jsonl"
)
NEEDS_COLOURS = "no colours; set clip= to openai/clip-vit-large-patch14 or its folder, or give a color with each object"


@dataclass
class GenEvalConfig:
    """Which images, and who says what is in them."""

    images: str = ""
    detector: str = ""
    """Folder or hub id of a transformers Mask2Former of COCO instances."""
    clip: str = ""
    """Folder or hub id of the CLIP that names colours."""
    detections: str = ""
    """Objects from elsewhere in the place of `detector` and `clip`."""
    out: str = ""
    """File of the result; IMAGES.json by default."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("set images=FOLDER, as eval.benchmarks.generate_images made it with layout=geneval")
        if self.detector and self.detections:
            raise ValueError("detector and detections are both set; objects come from one of them")
        self.out = self.out or f"{self.images.rstrip('/')}.json"


class Drawn(NamedTuple):
    """An image (its name below the folder) and what its prompt demands."""

    file: str
    place: str
    demand: Demand


def main(arguments: Sequence[str]) -> None:
    """Score a folder of images."""
    about = "GenEval: do drawn images show the objects, numbers, colours and positions of their prompts?"
    run_command(GenEvalConfig, geneval, name="geneval", about=about, arguments=arguments)


def geneval(config: GenEvalConfig) -> None:
    """Find the objects, apply the rules, write the rows.

    Raises:
        UserError: no images, or a model or file that is not there.
    """
    began, left_out = time.monotonic(), LeftOut()
    images, drawn = listed(Path(config.images), left_out=left_out)
    of = Measurement("geneval", drawn.seed, {**drawn.protocol, **SETTINGS, "judge": judge_of(config)})
    pins = dict(drawn.pins)
    if config.detections:
        pins["detections_sha256"] = image_name(Path(config.detections))
    common: dict[str, Any] = {"config": config, "left_out": left_out, "began": began, "pins": pins}
    if not config.detector and not config.detections:
        return write_result(config.out, holes(of, note=NEEDS_DETECTOR), **common)
    try:
        objects = find_objects(config, images=images, left_out=left_out)
    except NoJudgeError as error:
        return write_result(config.out, holes(of, note=str(error)), **common) if is_main() else None
    if objects is None:
        return None
    verdicts = judge(images, objects=objects)
    has_colours = bool(config.clip) or any(each.color for given in objects.values() for each in given)
    rows = scores(images, verdicts=verdicts, has_colours=has_colours, left_out=left_out, of=of)
    samples = [{"file": file, **each._asdict()} for file, each in verdicts.items()]
    return write_result(config.out, rows, samples=samples, **common)


def holes(of: Measurement, *, note: str) -> list[Score]:
    """The rows where nobody can judge."""
    return [of.missing(name, note=note, unit="%", paper=GENEVAL_LLAMAGEN_QLIP[name]) for name in (*TAGS, "mean")]


def listed(folder: Path, *, left_out: LeftOut) -> tuple[list[Drawn], DrawnFolder]:
    """Every image that should be there, with its demand, and what is known of the drawing.

    Raises:
        UserError: no such folder, or no prompt with readable metadata in it.
    """
    if has_manifest(folder):
        drawn = read_drawn(folder)
        names = {prompt.files[0].split("/")[0]: prompt.files for prompt in drawn.prompts}
    else:
        places = sorted(file.parent.name for file in folder.glob("*/metadata.jsonl"))
        names = {place: [f"{place}/samples/{copy:04d}.png" for copy in range(NUM_IMAGES)] for place in places}
        drawn = DrawnFolder({"layout": "geneval", "images_per_prompt": NUM_IMAGES, "num_prompts": len(names)}, {}, [])
    images = []
    for place, files in names.items():
        try:
            demand = read_demand(json.loads((folder / place / "metadata.jsonl").read_bytes()))
        except FileNotFoundError:
            left_out.add("prompt not drawn", place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            left_out.add("unreadable metadata", f"{place}/metadata.jsonl")
        else:
            images += [Drawn(file, place, demand) for file in files]
    if not images:
        raise UserError(f"{folder} holds no prompt of GenEval (00000/metadata.jsonl); draw with layout=geneval first")
    prompts_sha256 = texts_sha256(list({each.place: each.demand.prompt for each in images}.values()))
    return images, drawn._replace(protocol={"prompts_sha256": prompts_sha256, **drawn.protocol})


def judge_of(config: GenEvalConfig) -> str:
    """Who says what is in the images, with the weights."""
    if config.detections:
        return "supplied detections"
    detector = f"transformers Mask2Former {folder_sha256(config.detector)}" if config.detector else "none"
    return f"{detector}, CLIP {folder_sha256(config.clip)}" if config.clip else detector


def find_objects(config: GenEvalConfig, *, images: Sequence[Drawn], left_out: LeftOut) -> dict[str, list[Found]] | None:
    """The objects of every image that has any said of it; None on all ranks but the first."""
    demands = {each.file: each.demand for each in images}
    if config.detections:
        given = supplied(config.detections, field="objects", files=list(demands), left_out=left_out)
    else:
        found = judgements(
            {file: Path(config.images) / file for file in demands},
            stem=Path(config.out).with_suffix(".detections"),
            made_by=judge_name(judge_of(config), SETTINGS),
            open_judge=lambda: _open_judge(config, demands=demands),
            label="find objects",
            left_out=left_out,
        )
        if found is None:
            return None
        given = found
    objects = {}
    for file, values in given.items():
        try:
            objects[file] = [_from_json(value) for value in values]
        except (KeyError, TypeError, ValueError):
            left_out.add("objects without class, score and box", file)
    return objects


def _open_judge(config: GenEvalConfig, *, demands: Mapping[str, Demand]) -> Judge:
    from eval.benchmarks.detector import Mask2Former, objects_of
    from eval.metrics.clipscore import load_clip

    detector, clip = Mask2Former(config.detector), load_clip(config.clip) if config.clip else None

    def detect(files: Sequence[str], images: "Sequence[Image.Image]") -> list[Any]:
        return [
            [
                {"class": each.name, "score": each.score, "box": each.box, "color": each.color}
                for each in objects_of(image, demand=demands[file], detector=detector, clip=clip)
            ]
            for file, image in zip(files, images, strict=True)
        ]

    return detect


def _from_json(value: Mapping[str, Any]) -> Found:
    left, top, right, bottom = map(float, value["box"])
    return Found(str(value["class"]), float(value["score"]), (left, top, right, bottom), value.get("color") or "")


def judge(images: Sequence[Drawn], *, objects: Mapping[str, Sequence[Found]]) -> dict[str, Verdict]:
    """The verdict on every image whose objects are known."""
    return {each.file: verdict(each.demand, objects[each.file]) for each in images if each.file in objects}


def scores(
    images: Sequence[Drawn],
    *,
    verdicts: Mapping[str, Verdict],
    has_colours: bool,
    left_out: LeftOut,
    of: Measurement,
) -> list[Score]:
    """Share of right images for each of the six tasks, and their mean: GenEval's overall score.

    Intervals draw prompts, not images: the images of one prompt succeed and fail together.
    """
    rows, paper = list[Score](), GENEVAL_LLAMAGEN_QLIP
    right, weight = list[float](), list[float]()  # of every prompt, as shares of its task
    for tag in TAGS:
        asked = [each for each in images if each.demand.tag == tag]
        judged = [each for each in asked if each.file in verdicts]
        note = "" if judged else "no image of this task was judged"
        if judged and not has_colours and any(each.demand.asks_colour for each in asked):
            note = NEEDS_COLOURS
        if note:
            rows.append(of.missing(tag, note=note, unit="%", paper=paper[tag]))
            continue
        places: dict[str, list[bool]] = {}
        for each in judged:
            places.setdefault(each.place, []).append(verdicts[each.file].correct)
        own_right = [sum(given) / len(judged) for given in places.values()]
        own_weight = [len(given) / len(judged) for given in places.values()]
        ends = bootstrap(own_right, weights=own_weight)._asdict()
        counted = {"n": len(judged), "skipped": len(asked) - len(judged)}
        rows.append(of.score(tag, sum(own_right), unit="%", paper=paper[tag], **counted, **ends))
        right, weight = right + own_right, weight + own_weight
    if absent := [row.metric for row in rows if row.value is None]:
        note = f"needs all six tasks; missing: {', '.join(absent)}"
        return [*rows, of.missing("mean", note=note, unit="%", paper=paper["mean"])]
    ends = bootstrap(right, weights=weight)._asdict()
    note = "; ".join(filter(None, ["mean of the six tasks", left_out.note()]))
    counted = {"n": len(verdicts), "skipped": len(images) - len(verdicts)}
    return [
        *rows,
        of.score("mean", sum(right) / len(TAGS), unit="%", paper=paper["mean"], note=note, **counted, **ends),
    ]
