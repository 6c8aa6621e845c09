"""DPG-Bench's rules (Hu et al. 2024): questions that depend on others, and what answers to them are worth.

A question counts only if the questions it depends on were answered yes; the score of an image is the share of its
questions that count and were answered yes, that of the benchmark the mean over images, prompts, times 100.

`official` follows the published script in what looks like slips there, for numbers that have to compare with others':
it leaves out the first question of the file, drops prompts in which that breaks a dependency, and takes the answers of
a prompt's last image alone, dependencies ignored, for its categories.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from um3.core.errors import UserError

LEVEL_1 = ("global", "entity", "attribute", "relation", "other")
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    """A question about a prompt's image; `parents` are the numbers of those it depends on."""

    number: int
    text: str
    category: str
    parents: list[int]


class Answered(NamedTuple):
    """A prompt's answers: for each image, whether each question (by number) was answered yes."""

    questions: Sequence[Question]
    images: Sequence[Mapping[int, bool]]


class Result(NamedTuple):
    """Mean score of each prompt, and all the answers of each category, as shares."""

    by_prompt: dict[str, float]
    by_category: dict[str, list[float]]
    dropped: list[str]

    @property
    def by_level_1(self) -> dict[str, list[float]]:
        """`entity - whole` and its like under `entity`."""
        found: dict[str, list[float]] = {}
        for category, values in self.by_category.items():
            found.setdefault(category.split("-")[0].strip(), []).extend(values)
        return found


def read_questions(path: str | Path, *, official: bool = False) -> dict[str, list[Question]]:
    """The questions of every item of dpg_bench.csv, in the order of the file.

    Raises:
        UserError: no such file, missing columns, a row that cannot be read, or a parent that is no question.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); give DPG-Bench's dpg_bench.csv") from None
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"{path} needs rows with {', '.join(COLUMNS)}; give DPG-Bench's dpg_bench.csv")
    items: dict[str, list[Question]] = {}
    for line, row in enumerate(rows[1:] if official else rows, start=3 if official else 2):
        try:
            parents = [int(number) for number in row["dependency"].split(",")]
            category = row["tuple"].split("(")[0].strip()
            question = Question(int(row["proposition_id"]), row["question_natural_language"], category, parents)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: row {line} ({row.get('item_id')}) cannot be read: {error}") from None
        items.setdefault(row["item_id"], []).append(question._replace(parents=[p for p in parents if p]))
    if not official:
        _check_parents(items, path=path)
    return items


def _check_parents(items: Mapping[str, Sequence[Question]], *, path: str | Path) -> None:
    for item, questions in items.items():
        numbers = {question.number for question in questions}
        for question in questions:
            if absent := set(question.parents) - numbers:
                raise UserError(f"{path}: question {question.number} of {item} depends on {min(absent)}, which is none")


def counted(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, float]:
    """1 or 0 for each question: 0 as well where one it depends on counts 0. One pass in the order of the file, so
    what falls takes those behind it along.

    Raises:
        KeyError: a question without an answer, or a parent that is no question.
    """
    values = {question.number: float(answers[question.number]) for question in questions}
    for question in questions:
        if any(values[parent] == 0 for parent in question.parents):
            values[question.number] = 0.0
    return values


def evaluate(items: Mapping[str, Answered], *, official: bool = False) -> Result:
    """Score prompts by their answers."""
    by_prompt: dict[str, float] = {}
    by_category: dict[str, list[float]] = {}
    dropped = []
    for item, answered in items.items():
        try:
            values = [counted(answered.questions, answers) for answers in answered.images]
        except KeyError:
            dropped.append(item)
            continue
        by_prompt[item] = statistics.fmean(statistics.fmean(image.values()) for image in values)
        shown = [{n: float(yes) for n, yes in answered.images[-1].items()}] if official else values
        for image in shown:
            for question in answered.questions:
                by_category.setdefault(question.category, []).append(image[question.number])
    return Result(by_prompt, by_category, dropped)
