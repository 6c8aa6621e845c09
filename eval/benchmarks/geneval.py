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
from typing import Any

from eval.benchmarks import geneval_rules as rules
from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.benchmarks.geneval_rules import TAGS, DetectedObject, Requirement, Verdict
from eval.command import model_hash, run_command
from eval.paper_values import GENEVAL_LLAMAGEN_QLIP as PAPER
from eval.results_cache import ImageModel, UnavailableError
from eval.scores import Score, bootstrap
from um3.core.errors import UserError
from um3.core.files import short_hash

NUM_IMAGES = 4
FIELDS = ("class", "score", "box", "color")
REMEDY = "set detector= to facebook/mask2former-swin-small-coco-instance or its folder"
NEEDS_DETECTOR = f"{REMEDY}, or detections=FILE.jsonl"
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


def main(arguments: Sequence[str]) -> None:
    """Detect the objects of a folder of images, apply the rules and write the scores."""

    def geneval(config: GenEvalConfig) -> None:
        Benchmark.of_images("geneval", config).run(_score, paper=PAPER, unit="%")

    about = "GenEval: do images show the objects, numbers, colours and positions of their prompts?"
    run_command(GenEvalConfig, geneval, name="geneval", about=about, arguments=arguments)


def _score(benchmark: Benchmark) -> tuple[list[Score], Any]:
    config: GenEvalConfig = benchmark.config
    requirements = read_requirements(benchmark)

    def open_detector() -> ImageModel:
        from eval.benchmarks.detector import Mask2Former, objects_of
        from eval.metrics.clipscore import load_clip

        judges: dict[str, Any] = {"detector": Mask2Former(config.detector)}
        judges["clip"] = load_clip(config.clip) if config.clip else None

        def detect(files: Sequence[str], images: Sequence[Any]) -> list[Any]:
            pairs = zip(files, images, strict=True)
            found = [objects_of(image, requirement=requirements[file], **judges) for file, image in pairs]
            return [[dict(zip(FIELDS, one, strict=True)) for one in objects] for objects in found]

        return detect

    judge = "supplied detections"
    if not config.detections:
        judge = f"transformers Mask2Former {model_hash(config.detector)}" if config.detector else "none"
        judge += f", CLIP {model_hash(config.clip)}" if config.clip else ""
    benchmark.add_protocol(**rules.SETTINGS, judge=judge)
    if not config.detector and not config.detections:
        raise UnavailableError(NEEDS_DETECTOR)
    objects = benchmark.results(
        {file: Path(config.images) / file for file in requirements},
        protocol=[judge, rules.SETTINGS, requirements],  # which colours are looked at depends on the prompt
        open_model=open_detector,
        label="detect objects",
        supplied=config.detections,
        field="objects",
        parse=lambda detections: list(map(_from_json, detections)),
        unusable="objects without class, score and box",
    )
    verdicts = {file: rules.verdict(requirements[file], found) for file, found in objects.items()}
    has_colours = bool(config.clip) or any(detected.color for detections in objects.values() for detected in detections)
    rows = scores(benchmark, requirements=requirements, verdicts=verdicts, has_colours=has_colours)
    return rows, [{"file": file, **verdict._asdict()} for file, verdict in verdicts.items()]


def read_requirements(benchmark: Benchmark) -> dict[str, Requirement]:
    """What the prompt of each image (FOLDER/samples/COPY.png) that the folder should contain requires."""
    folder, skipped = Path(benchmark.config.images), benchmark.skipped
    files_of = {prompt.files[0].split("/")[0]: prompt.files for prompt in benchmark.generated.prompts}
    if not files_of:  # GenEval's own layout without a manifest
        names = sorted(file.parent.name for file in folder.glob("[!.]*/metadata.jsonl"))
        files_of = {name: [f"{name}/samples/{copy:04d}.png" for copy in range(NUM_IMAGES)] for name in names}
        benchmark.add_protocol(layout="geneval", images_per_prompt=NUM_IMAGES, num_prompts=len(names))
    requirements, prompts = dict[str, Requirement](), list[str]()
    for name, files in files_of.items():
        try:
            requirement = rules.read_requirement(json.loads((folder / name / "metadata.jsonl").read_bytes()))
        except FileNotFoundError:
            skipped.add("prompt without images", name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped.add("unreadable metadata", f"{name}/metadata.jsonl")
        else:
            prompts.append(requirement.prompt)
            requirements |= dict.fromkeys(files, requirement)
    if not requirements:
        remedy = "run generate-images with layout=geneval first"
        raise UserError(f"no 00000/metadata.jsonl of GenEval in {folder}; {remedy}")
    benchmark.add_protocol(**{"prompts_sha256": short_hash(prompts), **benchmark.measurement.protocol})
    return requirements


def _from_json(value: Mapping[str, Any]) -> DetectedObject:
    left, top, right, bottom = map(float, value["box"])
    box = (left, top, right, bottom)
    return DetectedObject(str(value["class"]), float(value["score"]), box, value.get("color") or "")


def scores(
    benchmark: Benchmark, *, requirements: Mapping[str, Requirement], verdicts: Mapping[str, Verdict], has_colours: bool
) -> list[Score]:
    """The share of correct images in each of the six tasks, and their mean: GenEval's overall score.

    Intervals resample prompts, not images: the images of one prompt succeed and fail together.
    """
    of, rows, shares, weights = benchmark.measurement, list[Score](), list[float](), list[float]()
    for tag in TAGS:
        requested = [file for file, requirement in requirements.items() if requirement.tag == tag]
        judged = [file for file in requested if file in verdicts]
        note = "" if judged else "no image of this task was judged"
        if judged and not has_colours and any(requirements[file].needs_colour for file in requested):
            note = NEEDS_COLOURS
        if note:
            rows.append(of.missing(tag, note=note, unit="%", paper=PAPER[tag]))
            continue
        by_prompt: dict[str, list[bool]] = {}
        for file in judged:
            by_prompt.setdefault(file.split("/")[0], []).append(verdicts[file].correct)
        task_shares = [sum(correct) / len(judged) for correct in by_prompt.values()]
        task_weights = [len(correct) / len(judged) for correct in by_prompt.values()]
        fields: dict[str, Any] = {"n": len(judged), "skipped": len(requested) - len(judged), "paper": PAPER[tag]}
        fields |= bootstrap(task_shares, weights=task_weights)._asdict()
        rows.append(of.score(tag, sum(task_shares), unit="%", **fields))
        shares, weights = shares + task_shares, weights + task_weights
    mean: dict[str, Any] = {"unit": "%", "paper": PAPER["mean"]}
    if absent := [row.metric for row in rows if row.value is None]:
        return [*rows, of.missing("mean", note=f"needs all six tasks; missing: {', '.join(absent)}", **mean)]
    mean |= {"n": len(verdicts), "skipped": len(requirements) - len(verdicts)}
    note = "; ".join(filter(None, ["mean of the six tasks", benchmark.skipped.note()]))
    mean |= bootstrap(shares, weights=weights)._asdict()
    return [*rows, of.score("mean", sum(shares) / len(TAGS), note=note, **mean)]
