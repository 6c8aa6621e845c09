"""`python -m eval geneval images=FOLDER detector=FOLDER clip=FOLDER`: GenEval of generated images, by its own rules.

`images` is a folder of `generate-images` with layout=geneval, or of GenEval's own layout. A transformers Mask2Former
detects objects and a CLIP classifies their colours, once per image; a killed run resumes, and the ranks of a torchrun
share the images. `detections=FILE.jsonl` with {"file", "objects": [{"class", "score", "box", "color"}]} on each line
replaces both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.benchmarks import geneval_rules as rules
from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.benchmarks.geneval_rules import TAGS, DetectedObject, Requirement, Verdict
from eval.command import model_hash, run_command
from eval.paper_values import GENEVAL_LLAMAGEN_QLIP as PAPER
from eval.results_cache import ImageModel, UnavailableError
from eval.scores import Score, bootstrap
from um3.core.errors import UserError
from um3.core.files import short_hash

if TYPE_CHECKING:
    from PIL import Image

NUM_IMAGES = 4
NEEDS_DETECTOR = (
    "set detector= to facebook/mask2former-swin-small-coco-instance or its folder, or detections=FILE.jsonl"
)
NEEDS_COLOURS = "no colours; set clip= to openai/clip-vit-large-patch14 or its folder, or give each object a color"


@dataclass
class GenEvalConfig(ScoredImagesConfig):
    """The images and the models that detect objects in them."""

    detector: str = ""
    """Folder or hub id of a transformers Mask2Former of COCO instances."""
    clip: str = ""
    """Folder or hub id of the CLIP that classifies colours."""
    detections: str = ""
    """File of objects from another program instead of `detector` and `clip`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detector and self.detections:
            raise ValueError("detector and detections are both set; set one of them")


class GenEvalImage(NamedTuple):
    """An image (its name below the folder), the folder of its prompt, and what the prompt requires."""

    file: str
    prompt_folder: str
    requirement: Requirement


def main(arguments: Sequence[str]) -> None:
    """Score a folder of images."""
    about = "GenEval: do images show the objects, numbers, colours and positions of their prompts?"
    run_command(GenEvalConfig, geneval, name="geneval", about=about, arguments=arguments)


def geneval(config: GenEvalConfig) -> None:
    """Detect the objects, apply the rules and write the scores.

    Raises:
        UserError: no images, or a missing file.
    """
    Benchmark.of_images("geneval", config).run(_score, paper=PAPER, unit="%")


def _score(benchmark: Benchmark) -> tuple[list[Score], Any]:
    config: GenEvalConfig = benchmark.config
    images = read_images(benchmark)
    benchmark.add_protocol(**rules.SETTINGS, judge=_judge_name(config))
    if not config.detector and not config.detections:
        raise UnavailableError(NEEDS_DETECTOR)
    objects = find_objects(benchmark, images=images)
    verdicts = {
        image.file: rules.verdict(image.requirement, objects[image.file]) for image in images if image.file in objects
    }
    has_colours = bool(config.clip) or any(detected.color for detections in objects.values() for detected in detections)
    rows = scores(benchmark, images=images, verdicts=verdicts, has_colours=has_colours)
    return rows, [{"file": file, **verdict._asdict()} for file, verdict in verdicts.items()]


def read_images(benchmark: Benchmark) -> list[GenEvalImage]:
    """List the images that the folder should contain, with their requirements.

    Raises:
        UserError: no such folder, or no prompt with readable metadata in it.
    """
    folder, skipped = Path(benchmark.config.images), benchmark.skipped
    files_of = {prompt.files[0].split("/")[0]: prompt.files for prompt in benchmark.generated.prompts}
    if not files_of:  # GenEval's own layout without a manifest
        names = sorted(file.parent.name for file in folder.glob("*/metadata.jsonl"))
        files_of = {name: [f"{name}/samples/{copy:04d}.png" for copy in range(NUM_IMAGES)] for name in names}
        benchmark.add_protocol(layout="geneval", images_per_prompt=NUM_IMAGES, num_prompts=len(names))
    images, prompts = list[GenEvalImage](), list[str]()
    for name, files in files_of.items():
        try:
            requirement = rules.read_requirement(json.loads((folder / name / "metadata.jsonl").read_bytes()))
        except FileNotFoundError:
            skipped.add("prompt without images", name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            skipped.add("unreadable metadata", f"{name}/metadata.jsonl")
        else:
            prompts.append(requirement.prompt)
            images += [GenEvalImage(file, name, requirement) for file in files]
    if not images:
        raise UserError(
            f"no 00000/metadata.jsonl of GenEval in {folder}; run generate-images with layout=geneval first"
        )
    benchmark.add_protocol(**{"prompts_sha256": short_hash(prompts), **benchmark.measurement.protocol})
    return images


def find_objects(benchmark: Benchmark, *, images: Sequence[GenEvalImage]) -> dict[str, list[DetectedObject]]:
    """Detect the objects of every readable image, or read them from `config.detections`."""
    config: GenEvalConfig = benchmark.config
    requirements = {image.file: image.requirement for image in images}
    results = benchmark.results(
        {file: Path(config.images) / file for file in requirements},
        protocol=[benchmark.measurement.protocol["judge"], rules.SETTINGS],
        open_model=lambda: _open_detector(config, requirements=requirements),
        label="detect objects",
        supplied=config.detections,
        field="objects",
    )
    objects = {}
    for file, detections in results.items():
        try:
            objects[file] = [_from_json(detection) for detection in detections]
        except (KeyError, TypeError, ValueError):
            benchmark.skipped.add("objects without class, score and box", file)
    return objects


def _judge_name(config: GenEvalConfig) -> str:
    """The models that detect objects and colours, with their weights."""
    if config.detections:
        return "supplied detections"
    detector = f"transformers Mask2Former {model_hash(config.detector)}" if config.detector else "none"
    return f"{detector}, CLIP {model_hash(config.clip)}" if config.clip else detector


def _open_detector(config: GenEvalConfig, *, requirements: Mapping[str, Requirement]) -> ImageModel:
    from eval.benchmarks.detector import Mask2Former, objects_of
    from eval.metrics.clipscore import load_clip

    detector, clip = Mask2Former(config.detector), load_clip(config.clip) if config.clip else None

    def detect(files: Sequence[str], images: "Sequence[Image.Image]") -> list[Any]:
        return [
            [
                {"class": detected.name, "score": detected.score, "box": detected.box, "color": detected.color}
                for detected in objects_of(image, requirement=requirements[file], detector=detector, clip=clip)
            ]
            for file, image in zip(files, images, strict=True)
        ]

    return detect


def _from_json(value: Mapping[str, Any]) -> DetectedObject:
    left, top, right, bottom = map(float, value["box"])
    box = (left, top, right, bottom)
    return DetectedObject(str(value["class"]), float(value["score"]), box, value.get("color") or "")


def scores(
    benchmark: Benchmark, *, images: Sequence[GenEvalImage], verdicts: Mapping[str, Verdict], has_colours: bool
) -> list[Score]:
    """The share of correct images in each of the six tasks, and their mean: GenEval's overall score.

    Intervals resample prompts, not images: the images of one prompt succeed and fail together.
    """
    of, rows = benchmark.measurement, list[Score]()
    shares, weights = list[float](), list[float]()  # for each prompt, as a share of its task
    for tag in TAGS:
        requested = [image for image in images if image.requirement.tag == tag]
        judged = [image for image in requested if image.file in verdicts]
        note = "" if judged else "no image of this task was judged"
        if judged and not has_colours and any(image.requirement.needs_colour for image in requested):
            note = NEEDS_COLOURS
        if note:
            rows.append(of.missing(tag, note=note, unit="%", paper=PAPER[tag]))
            continue
        by_prompt: dict[str, list[bool]] = {}
        for image in judged:
            by_prompt.setdefault(image.prompt_folder, []).append(verdicts[image.file].correct)
        task_shares = [sum(correct) / len(judged) for correct in by_prompt.values()]
        task_weights = [len(correct) / len(judged) for correct in by_prompt.values()]
        ends = bootstrap(task_shares, weights=task_weights)._asdict()
        counts = {"n": len(judged), "skipped": len(requested) - len(judged)}
        rows.append(of.score(tag, sum(task_shares), unit="%", paper=PAPER[tag], **counts, **ends))
        shares, weights = shares + task_shares, weights + task_weights
    mean: dict[str, Any] = {"unit": "%", "paper": PAPER["mean"]}
    if absent := [row.metric for row in rows if row.value is None]:
        return [*rows, of.missing("mean", note=f"needs all six tasks; missing: {', '.join(absent)}", **mean)]
    mean |= bootstrap(shares, weights=weights)._asdict()
    mean |= {"n": len(verdicts), "skipped": len(images) - len(verdicts)}
    note = "; ".join(filter(None, ["mean of the six tasks", benchmark.skipped.note()]))
    return [*rows, of.score("mean", sum(shares) / len(TAGS), note=note, **mean)]
