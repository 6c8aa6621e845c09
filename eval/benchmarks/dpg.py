"""`python -m eval dpg images=FOLDER questions=dpg_bench.csv vqa=FOLDER`: DPG-Bench of generated images.

`images` is a folder of `generate-images` with layout=grid, or any folder of ID.png with up to four images each. A
vision-language model of transformers answers the questions once per file; a killed run resumes, and the ranks of a
torchrun share the files. `answers=FILE.jsonl` replaces the model; it has on each line
{"file": "ID.png", "answers": [{"1": "yes", "2": "no"}, ...]}, one object per image.

The published numbers use mPLUG-large as the judge. Numbers of another judge compare only among themselves.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.benchmarks.dpg_rules import LEVEL_1, Result, evaluate, read_questions
from eval.command import model_hash, run_command
from eval.paper_values import DPG_LLAMAGEN_QLIP as PAPER
from eval.results_cache import ImageModel, UnavailableError
from eval.scores import Score
from eval.tasks.generated_images import GRID_PLACES, has_manifest
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.ranges import NonNegativeInt, Range

if TYPE_CHECKING:
    from PIL import Image

YES = {"yes": True, "no": False, True: True, False: False}
NEEDS_JUDGE = "set vqa= to a vision-language model of transformers or its folder, or answers=FILE.jsonl"
NEEDS_QUESTIONS = "set questions= to dpg_bench.csv of github.com/TencentQQGYLab/ELLA"


@dataclass
class DPGConfig(ScoredImagesConfig):
    """The images, the questions, and the model that answers them."""

    questions: str = ""
    """DPG-Bench's dpg_bench.csv."""
    vqa: str = ""
    """Folder or hub id of a model that answers questions about images."""
    answers: str = ""
    """File of answers from another program instead of `vqa`."""
    num_images: Annotated[int, Range(1, len(GRID_PLACES))] = 4
    """Images in each file."""
    resolution: NonNegativeInt = 0
    """Side of one image in pixels; 0 for half of the file's side."""
    official: bool = False
    """Count as the published script does, including its probable mistakes (`eval.benchmarks.dpg_rules`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vqa and self.answers:
            raise ValueError("vqa and answers are both set; set one of them")


def main(arguments: Sequence[str]) -> None:
    """Answer the questions about a folder of images, apply the rules and write the scores."""

    def dpg(config: DPGConfig) -> None:
        Benchmark.of_images("dpg", config).run(_score, paper=PAPER, unit="x100")

    about = "DPG-Bench: the share of questions about a long prompt that its image answers with yes."
    run_command(DPGConfig, dpg, name="dpg", about=about, arguments=arguments)


def _score(benchmark: Benchmark) -> tuple[list[Score], Any]:
    from eval.vqa import models

    config: DPGConfig = benchmark.config
    if not config.questions or not (config.vqa or config.answers):
        raise UnavailableError(NEEDS_JUDGE if config.questions else NEEDS_QUESTIONS)
    if config.num_images == 1 and not config.resolution and not has_manifest(config.images):
        raise UserError("num_images=1: set resolution to the side of an image, which tells it from a sheet of four")
    questions = read_questions(config.questions, official=config.official)
    judge = "supplied answers" if config.answers else f"transformers {model_hash(config.vqa)}, {models.SETTINGS}"
    benchmark.add_protocol(
        questions_sha256=short_hash([question.text for asked in questions.values() for question in asked]),
        images_per_prompt=config.num_images,
        counting="official" if config.official else "all images, dependencies in categories too",
        judge=judge,
    )
    questions_of = {f"{item}.png": asked for item, asked in questions.items()}
    texts = {item: [question[:2] for question in asked] for item, asked in questions.items()}

    def open_model() -> ImageModel:
        model = models.VisionLanguageModel(config.vqa, setting="vqa")

        def answer(files: Sequence[str], images: "Sequence[Image.Image]") -> list[list[dict[str, bool]]]:
            results = []
            for file, image in zip(files, images, strict=True):
                texts = {str(question.number): question.text for question in questions_of[file]}
                parts = crops(image, side=config.resolution, count=config.num_images)
                results.append([dict(zip(texts, model.ask(part, list(texts.values())), strict=True)) for part in parts])
            return results

        return answer

    answers = benchmark.results(
        {file: Path(config.images) / file for file in questions_of},
        protocol=[judge, config.resolution, config.num_images, texts],
        open_model=open_model,
        label="answer questions",
        supplied=config.answers,
        field="answers",
        parse=lambda images: [{int(number): YES[answer] for number, answer in image.items()} for image in images],
        unusable="answers other than yes and no",
    )
    for file in [file for file, images in answers.items() if not images]:
        benchmark.skipped.add("image of another size", file)
    of_items = {file.removesuffix(".png"): images for file, images in answers.items() if images}
    result = evaluate(questions, of_items, official=config.official)
    for item in result.dropped:
        benchmark.skipped.add("no answer to a question, or to one it depends on", item)
    categories = {name: statistics.fmean(values) for name, values in result.by_category.items()}
    rows = scores(benchmark, result=result, num_prompts=len(questions))
    return rows, {"prompts": result.by_prompt, "categories": categories}


def crops(image: "Image.Image", *, side: int, count: int) -> "list[Image.Image]":
    """Cut the first `count` images out of a grid of 2 x 2 images of `side` pixels (0: any); empty for another size.

    A single image may also be a whole file of that size.
    """
    if count == 1 and image.size == (side, side):
        return [image]
    side = side or image.width // 2
    if image.size != (2 * side, 2 * side):
        return []
    corners = [(column * side, row * side) for row, column in GRID_PLACES[:count]]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]


def scores(benchmark: Benchmark, *, result: Result, num_prompts: int) -> list[Score]:
    """The mean score of the prompts, and the share of yes among the questions of each of the five categories."""
    of, note, values = benchmark.measurement, benchmark.skipped.note(), list(result.by_prompt.values())
    if not values:
        raise UnavailableError(f"no prompt could be scored: {note}")
    num_skipped = num_prompts - len(values)
    rows = [of.mean("overall", values, skipped=num_skipped, unit="x100", paper=PAPER["overall"], note=note)]
    for name in LEVEL_1:  # without intervals: the answers of a prompt are not independent
        values = result.by_level_1.get(name, [])
        mean, note = (statistics.fmean(values), "") if values else (None, "no question of this category")
        rows.append(of.score(name, mean, n=len(values), unit="x100", paper=PAPER[name], note=note))
    return rows
