"""DPG-Bench's rules (Hu et al. 2024): how the answers to questions that depend on each other are scored.

A yes counts only if the questions that it depends on were answered with yes. An image's score is the share of its
questions that count; the benchmark's score is 100 times the mean over images, then over prompts.

`official` repeats what look like mistakes of the published script, for numbers that compare with published ones: it
omits the first question of the file, drops prompts in which that breaks a dependency, and computes categories from the
answers to each prompt's last image, without dependencies.
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
    """A question about a prompt's image; `parents` are the numbers of the questions that it depends on."""

    number: int
    text: str
    category: str
    parents: list[int]


class Result(NamedTuple):
    """The mean score of each prompt, the answers (0 or 1) of each category, and the prompts without all answers."""

    by_prompt: dict[str, float]
    by_category: dict[str, list[float]]
    dropped: list[str]

    @property
    def by_level_1(self) -> dict[str, list[float]]:
        """The answers by broad category: `entity - whole` counts as `entity`."""
        broad: dict[str, list[float]] = {}
        for category, values in self.by_category.items():
            broad.setdefault(category.split("-")[0].strip(), []).extend(values)
        return broad


def read_questions(path: str | Path, *, official: bool = False) -> dict[str, list[Question]]:
    """The questions of every item of dpg_bench.csv, in the order of the file; UserError for another file or row."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); set questions= to DPG-Bench's dpg_bench.csv") from None
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"{path} needs rows with {', '.join(COLUMNS)}; set questions= to DPG-Bench's dpg_bench.csv")
    items: dict[str, list[Question]] = {}
    for line, row in enumerate(rows[1:] if official else rows, start=3 if official else 2):
        try:
            parents = [number for text in row["dependency"].split(",") if (number := int(text))]
            category = row["tuple"].split("(")[0].strip()
            question = Question(int(row["proposition_id"]), row["question_natural_language"], category, parents)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: row {line} ({row.get('item_id')}) cannot be read: {error}") from None
        items.setdefault(row["item_id"], []).append(question)
    for item, questions in items.items():
        numbers = {question.number for question in questions}
        for question in questions:
            if (absent := set(question.parents) - numbers) and not official:
                lost = f"depends on {min(absent)}, which does not exist"
                raise UserError(f"{path}: question {question.number} of {item} {lost}")
    return items


def counted(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, float]:
    """1 for each question whose answer and parents count, else 0, in one pass in the order of the file.

    KeyError for a question without an answer, or a parent that does not exist.
    """
    values = {question.number: float(answers[question.number]) for question in questions}
    for question in questions:
        if any(values[parent] == 0 for parent in question.parents):
            values[question.number] = 0.0
    return values


def evaluate(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Mapping[int, bool]]],
    *,
    official: bool = False,
) -> Result:
    """Score the prompts in `answers`: for each image whether the answer to each question (by number) is yes."""
    result = Result({}, {}, [])
    for item, images in answers.items():
        try:
            values = [counted(questions[item], of_image) for of_image in images]
        except KeyError:
            result.dropped.append(item)
            continue
        result.by_prompt[item] = statistics.fmean(statistics.fmean(image.values()) for image in values)
        last = {number: float(is_yes) for number, is_yes in images[-1].items()}
        for image in [last] if official else values:
            for question in questions[item]:
                result.by_category.setdefault(question.category, []).append(image[question.number])
    return result
