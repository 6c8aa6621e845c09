"""`python -m eval dpg images=FOLDER questions=dpg_bench.csv vqa=FOLDER`: DPG-Bench on drawn images.

`images` is a folder of `eval.benchmarks.generate_images` with layout=grid, or any with ID.png, four images in each. A vision-language model
of transformers answers the questions, image by image, resumable and shared over ranks; or a file does:
`answers=FILE.jsonl` with {"file": "ID.png", "answers": [{"1": "yes", "2": "no"}, ...]} a line, a table for each image.

The published numbers have mPLUG-large as the judge; another judge's numbers compare among themselves.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.dpg_rules import LEVEL_1, Answered, Question, Result, evaluate, read_questions
from eval.benchmarks.generated_images import GRID_PLACES, DrawnFolder, has_manifest, read_drawn
from eval.command import LeftOut, folder_sha256, run_command, write_result
from eval.paper_values import DPG_LLAMAGEN_QLIP
from eval.records import Judge, NoJudgeError, image_name, judge_name, judgements, supplied
from eval.scores import Measurement, Score, texts_sha256
from um3.core.distributed import is_main
from um3.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from eval.benchmarks.vqa import YesNo

NEEDS_JUDGE = "set vqa= to a vision-language model of transformers or its folder, or answers=FILE.jsonl"
NEEDS_QUESTIONS = "set questions= to dpg_bench.csv of github.com/TencentQQGYLab/ELLA"


@dataclass
class DPGConfig:
    """Which images, which questions, and who answers them."""

    images: str = ""
    questions: str = ""
    """DPG-Bench's dpg_bench.csv."""
    vqa: str = ""
    """Folder or hub id of a model that answers questions about images."""
    answers: str = ""
    """Answers from elsewhere in the place of `vqa`."""
    num_images: int = 4
    """Images in each file."""
    resolution: int = 0
    """Side of one image in pixels; 0 for half of the file's."""
    official: bool = False
    """Count as the published script does, with what looks like slips in it (`eval.benchmarks.dpg_rules`)."""
    out: str = ""
    """File of the result; IMAGES.json by default."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("set images=FOLDER, as eval.benchmarks.generate_images made it with layout=grid")
        if self.vqa and self.answers:
            raise ValueError("vqa and answers are both set; answers come from one of them")
        if not 1 <= self.num_images <= len(GRID_PLACES):
            raise ValueError(f"num_images is {self.num_images}; a file holds 1 to {len(GRID_PLACES)}")
        self.out = self.out or f"{self.images.rstrip('/')}.json"


def main(arguments: Sequence[str]) -> None:
    """Score a folder of images."""
    about = "DPG-Bench: how many of the questions about a long prompt does its image answer with yes?"
    run_command(DPGConfig, dpg, name="dpg", about=about, arguments=arguments)


def dpg(config: DPGConfig) -> None:
    """Answer the questions, apply the rules, write the rows.

    Raises:
        UserError: no such folder, or a model or file that is not there.
    """
    began, left_out = time.monotonic(), LeftOut()
    if not Path(config.images).is_dir():
        raise UserError(f"no folder {config.images}; draw the images with layout=grid first")
    drawn = read_drawn(config.images) if has_manifest(config.images) else DrawnFolder({}, {}, [])
    of, pins = Measurement("dpg", drawn.seed, drawn.protocol), dict(drawn.pins)
    if config.answers:
        pins["answers_sha256"] = image_name(Path(config.answers))
    common: dict[str, Any] = {"config": config, "left_out": left_out, "began": began, "pins": pins}
    if not config.questions or not (config.vqa or config.answers):
        return write_result(config.out, holes(of, note=NEEDS_JUDGE if config.questions else NEEDS_QUESTIONS), **common)
    questions = read_questions(config.questions, official=config.official)
    of = of.with_protocol(
        questions_sha256=texts_sha256([each.text for asked in questions.values() for each in asked]),
        images_per_prompt=config.num_images,
        counting="official" if config.official else "all images, dependencies in categories too",
        judge="supplied answers" if config.answers else _vqa_name(config),
    )
    try:
        answers = find_answers(config, questions=questions, left_out=left_out)
    except NoJudgeError as error:
        return write_result(config.out, holes(of, note=str(error)), **common) if is_main() else None
    if answers is None:
        return None
    items = {item: Answered(questions[item], given) for item, given in answers.items()}
    result = evaluate(items, official=config.official)
    for item in result.dropped:
        left_out.add("no answer to a question, or to one it depends on", item)
    rows = scores(result, num_prompts=len(questions), left_out=left_out, of=of)
    categories = {name: statistics.fmean(values) for name, values in result.by_category.items()}
    return write_result(config.out, rows, samples={"prompts": result.by_prompt, "categories": categories}, **common)


def holes(of: Measurement, *, note: str) -> list[Score]:
    """The rows where there is nothing to score."""
    return [of.missing(name, note=note, unit="x100", paper=value) for name, value in DPG_LLAMAGEN_QLIP.items()]


def find_answers(
    config: DPGConfig, *, questions: Mapping[str, Sequence[Question]], left_out: LeftOut
) -> dict[str, list[dict[int, bool]]] | None:
    """The answers to every item's questions for each of its images; None on all ranks but the first."""
    files = {f"{item}.png": item for item in questions}
    if config.answers:
        given = supplied(config.answers, field="answers", files=list(files), left_out=left_out)
    else:
        found = judgements(
            {file: Path(config.images) / file for file in files},
            stem=Path(config.out).with_suffix(".answers"),
            made_by=judge_name(_vqa_name(config), config.resolution, config.num_images, _as_json(questions)),
            open_judge=lambda: _open_judge(config, asked={file: questions[item] for file, item in files.items()}),
            label="answer questions",
            left_out=left_out,
        )
        if found is None:
            return None
        given = found
    answers = {}
    for file, images in given.items():
        try:
            told = [{int(number): _truth(value) for number, value in image.items()} for image in images]
        except (AttributeError, TypeError, ValueError):
            left_out.add("answers other than yes and no", file)
            continue
        if told:
            answers[files[file]] = told
        else:
            left_out.add("image of another size", file)
    return answers


def _truth(value: Any) -> bool:
    words = {"yes": True, "no": False}
    if isinstance(value, bool):
        return value
    if value not in words:
        raise ValueError(value)
    return words[value]


def _vqa_name(config: DPGConfig) -> str:
    from eval.benchmarks.vqa import SETTINGS

    return f"transformers {folder_sha256(config.vqa)}, {SETTINGS}"


def _as_json(questions: Mapping[str, Sequence[Question]]) -> Any:
    return {item: [each[:2] for each in asked] for item, asked in questions.items()}


def _open_judge(config: DPGConfig, *, asked: Mapping[str, Sequence[Question]]) -> Judge:
    from eval.benchmarks.vqa import YesNo

    model = YesNo(config.vqa)

    def answer(files: Sequence[str], images: "Sequence[Image.Image]") -> list[Any]:
        return [
            [
                _answers(model, crop, asked=asked[file])
                for crop in crops(image, side=config.resolution, count=config.num_images)
            ]
            for file, image in zip(files, images, strict=True)
        ]

    return answer


def _answers(model: "YesNo", image: "Image.Image", *, asked: Sequence[Question]) -> dict[str, bool]:
    told = model.ask(image, [question.text for question in asked])
    return {str(question.number): yes for question, yes in zip(asked, told, strict=True)}


def crops(image: "Image.Image", *, side: int, count: int) -> "list[Image.Image]":
    """The first `count` images of a grid; none if it is no square of 2 x 2 images of `side` pixels (0: any)."""
    side = side or image.width // 2
    if image.size != (2 * side, 2 * side):
        return []
    places = [(column * side, row * side) for row, column in GRID_PLACES[:count]]
    return [image.crop((left, top, left + side, top + side)) for left, top in places]


def scores(result: Result, *, num_prompts: int, left_out: LeftOut, of: Measurement) -> list[Score]:
    """The overall score over prompts, and the share of yes among the questions of each of the five categories."""
    if not result.by_prompt:
        return holes(of, note=f"no prompt could be scored: {left_out.note()}")
    n, paper = len(result.by_prompt), DPG_LLAMAGEN_QLIP
    values, note = list(result.by_prompt.values()), left_out.note()
    rows = [of.mean("overall", values, skipped=num_prompts - n, unit="x100", paper=paper["overall"], note=note)]
    for name in LEVEL_1:
        if values := result.by_level_1.get(name, []):
            # No interval: the answers of a prompt fall together.
            rows.append(of.score(name, statistics.fmean(values), n=len(values), unit="x100", paper=paper[name]))
        else:
            rows.append(of.missing(name, note="no question of this category", unit="x100", paper=paper[name]))
    return rows
