"""`python -m eval dpg images=FOLDER questions=dpg_bench.csv vqa=FOLDER`: DPG-Bench of generated images.

`images` is a folder of `generate-images` with layout=grid, or any folder of ID.png with up to four images each. A
vision-language model of transformers answers the questions once per file; a killed run resumes, and the ranks of a
torchrun share the files. `answers=FILE.jsonl` replaces the model; it has on each line
{"file": "ID.png", "answers": [{"1": "yes", "2": "no"}, ...]}, one object per image.

The published numbers use mPLUG-large as the judge. Numbers of another judge compare only among themselves.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.benchmarks.dpg_rules import LEVEL_1, AnsweredPrompt, Question, Result, evaluate, read_questions
from eval.command import model_hash, run_command
from eval.paper_values import DPG_LLAMAGEN_QLIP as PAPER
from eval.results_cache import ImageModel, UnavailableError
from eval.scores import Score
from eval.tasks.generated_images import GRID_PLACES
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.ranges import NonNegativeInt, Range

if TYPE_CHECKING:
    from PIL import Image

    from eval.benchmarks.vqa import YesNoModel

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
    """Score a folder of images."""
    about = "DPG-Bench: the share of questions about a long prompt that its image answers with yes."
    run_command(DPGConfig, dpg, name="dpg", about=about, arguments=arguments)


def dpg(config: DPGConfig) -> None:
    """Answer the questions, apply the rules and write the scores.

    Raises:
        UserError: no such folder, or a missing file.
    """
    if not Path(config.images).is_dir():
        raise UserError(f"{config.images} does not exist; run generate-images with layout=grid first")
    Benchmark.of_images("dpg", config).run(_score, paper=PAPER, unit="x100")


def _score(benchmark: Benchmark) -> tuple[list[Score], Any]:
    config: DPGConfig = benchmark.config
    if not config.questions or not (config.vqa or config.answers):
        raise UnavailableError(NEEDS_JUDGE if config.questions else NEEDS_QUESTIONS)
    questions = read_questions(config.questions, official=config.official)
    benchmark.add_protocol(
        questions_sha256=short_hash([question.text for asked in questions.values() for question in asked]),
        images_per_prompt=config.num_images,
        counting="official" if config.official else "all images, dependencies in categories too",
        judge=_judge_name(config),
    )
    answers = find_answers(benchmark, questions=questions)
    items = {item: AnsweredPrompt(questions[item], images) for item, images in answers.items()}
    result = evaluate(items, official=config.official)
    for item in result.dropped:
        benchmark.skipped.add("no answer to a question, or to one it depends on", item)
    categories = {name: statistics.fmean(values) for name, values in result.by_category.items()}
    rows = scores(benchmark, result=result, num_prompts=len(questions))
    return rows, {"prompts": result.by_prompt, "categories": categories}


def find_answers(
    benchmark: Benchmark, *, questions: Mapping[str, Sequence[Question]]
) -> dict[str, list[dict[int, bool]]]:
    """Answer every item's questions for each of its images, or read the answers from `config.answers`."""
    config: DPGConfig = benchmark.config
    questions_of = {f"{item}.png": asked for item, asked in questions.items()}
    texts = {item: [question[:2] for question in asked] for item, asked in questions.items()}
    results = benchmark.results(
        {file: Path(config.images) / file for file in questions_of},
        protocol=[benchmark.measurement.protocol["judge"], config.resolution, config.num_images, texts],
        open_model=lambda: _open_model(config, questions=questions_of),
        label="answer questions",
        supplied=config.answers,
        field="answers",
    )
    answers = {}
    for file, images in results.items():
        try:
            parsed = [{int(number): _is_yes(answer) for number, answer in image.items()} for image in images]
        except (AttributeError, TypeError, ValueError):
            benchmark.skipped.add("answers other than yes and no", file)
            continue
        if parsed:
            answers[file.removesuffix(".png")] = parsed
        else:
            benchmark.skipped.add("image of another size", file)
    return answers


def _is_yes(answer: Any) -> bool:
    if isinstance(answer, bool):
        return answer
    if answer not in ("yes", "no"):
        raise ValueError(answer)
    return bool(answer == "yes")


def _judge_name(config: DPGConfig) -> str:
    from eval.benchmarks.vqa import SETTINGS

    if config.answers:
        return "supplied answers"
    return f"transformers {model_hash(config.vqa)}, {SETTINGS}"


def _open_model(config: DPGConfig, *, questions: Mapping[str, Sequence[Question]]) -> ImageModel:
    from eval.benchmarks.vqa import YesNoModel

    model = YesNoModel(config.vqa)

    def answer(files: Sequence[str], images: "Sequence[Image.Image]") -> list[list[dict[str, bool]]]:
        return [
            [
                _answers(model, crop, questions=questions[file])
                for crop in crops(image, side=config.resolution, count=config.num_images)
            ]
            for file, image in zip(files, images, strict=True)
        ]

    return answer


def _answers(model: "YesNoModel", image: "Image.Image", *, questions: Sequence[Question]) -> dict[str, bool]:
    answers = model.ask(image, [question.text for question in questions])
    return {str(question.number): is_yes for question, is_yes in zip(questions, answers, strict=True)}


def crops(image: "Image.Image", *, side: int, count: int) -> "list[Image.Image]":
    """Cut the first `count` images out of a grid of 2 x 2 images of `side` pixels (0: any); empty for another size."""
    side = side or image.width // 2
    if image.size != (2 * side, 2 * side):
        return []
    corners = [(column * side, row * side) for row, column in GRID_PLACES[:count]]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]


def scores(benchmark: Benchmark, *, result: Result, num_prompts: int) -> list[Score]:
    """The mean score of the prompts, and the share of yes among the questions of each of the five categories.

    Raises:
        UnavailableError: no prompt could be scored.
    """
    of, note, values = benchmark.measurement, benchmark.skipped.note(), list(result.by_prompt.values())
    if not values:
        raise UnavailableError(f"no prompt could be scored: {note}")
    num_skipped = num_prompts - len(values)
    rows = [of.mean("overall", values, skipped=num_skipped, unit="x100", paper=PAPER["overall"], note=note)]
    for name in LEVEL_1:
        if values := result.by_level_1.get(name, []):
            # Without an interval: the answers of a prompt are not independent.
            rows.append(of.score(name, statistics.fmean(values), n=len(values), unit="x100", paper=PAPER[name]))
        else:
            rows.append(of.missing(name, note="no question of this category", unit="x100", paper=PAPER[name]))
    return rows
