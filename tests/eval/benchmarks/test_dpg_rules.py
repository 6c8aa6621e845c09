"""DPG-Bench's rules by hand, and against a second implementation of the published script on random tables."""

import csv
import random

import pytest

from eval.benchmarks.dpg_rules import AnsweredPrompt, counted, evaluate, read_questions
from um3.core.errors import UserError

HEADER = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"]
HEADER += ["question_natural_language"]


def write(path, rows):
    """rows: (item, number, dependency, tuple)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for item, number, dependency, category in rows:
            writer.writerow([item, "a long prompt", "", number, dependency, "", "", category, f"Is {number} there?"])
    return path


ROWS = [
    ("a", 1, "0", "entity - whole (cabbages)"),
    ("a", 2, "1", "attribute - color (cabbages, green)"),
    ("a", 3, "1,2", "relation - spatial (cabbages, soil, in)"),
    ("b", 1, "0", "global - (photo)"),
    ("b", 2, "0", "other - count (cabbages, ==8)"),
]


@pytest.fixture
def questions(tmp_path):
    return read_questions(write(tmp_path / "dpg_bench.csv", ROWS))


def test_questions_are_read_in_order_with_categories_and_parents(questions):
    assert list(questions) == ["a", "b"]
    assert [question.parents for question in questions["a"]] == [[], [1], [1, 2]]
    assert [question.category for question in questions["a"]] == [
        "entity - whole",
        "attribute - color",
        "relation - spatial",
    ]
    assert questions["b"][1].text == "Is 2 there?"


@pytest.mark.parametrize(
    ("answers", "values"),
    [
        ((True, True, True), [1, 1, 1]),
        ((True, False, True), [1, 0, 0]),
        ((False, True, True), [0, 0, 0]),  # 2 depends on 1, and 3 on both
        ((True, True, False), [1, 1, 0]),
    ],
)
def test_a_no_discards_everything_that_depends_on_it(questions, answers, values):
    values_of = counted(questions["a"], dict(enumerate(answers, start=1)))
    assert list(values_of.values()) == values


def test_scores_of_prompts_and_categories(questions):
    yes, no_first = {1: True, 2: True, 3: True}, {1: False, 2: True, 3: True}
    result = evaluate({
        "a": AnsweredPrompt(questions["a"], [yes, no_first]),
        "b": AnsweredPrompt(questions["b"], [{1: True, 2: False}] * 2),
    })  # fmt: skip
    assert result.by_prompt == {"a": 0.5, "b": 0.5} and result.dropped == []
    assert result.by_level_1["attribute"] == [1, 0] and result.by_level_1["other"] == [0, 0]


def test_the_official_script_reads_its_categories_off_the_last_image_without_dependencies(questions):
    yes, no_first = {1: True, 2: True, 3: True}, {1: False, 2: True, 3: True}
    result = evaluate({"a": AnsweredPrompt(questions["a"], [yes, no_first])}, official=True)
    assert result.by_prompt == {"a": 0.5}
    assert result.by_level_1 == {"entity": [0], "attribute": [1], "relation": [1]}


def test_the_official_script_leaves_out_the_first_question_and_what_depends_on_it(tmp_path):
    questions = read_questions(write(tmp_path / "dpg_bench.csv", ROWS), official=True)
    assert [question.number for question in questions["a"]] == [2, 3]
    answered = {
        "a": AnsweredPrompt(questions["a"], [{2: True, 3: True}]),
        "b": AnsweredPrompt(questions["b"], [{1: True, 2: True}]),
    }
    result = evaluate(answered, official=True)
    assert result.dropped == ["a"] and result.by_prompt == {"b": 1.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "needs rows with item_id"),
        ([("a", "one", "0", "entity - whole (x)")], "row 2 .a. cannot be read"),
        ([("a", 1, "zero", "entity - whole (x)")], "row 2 .a. cannot be read"),
        ([("a", 1, "7", "entity - whole (x)")], "question 1 of a depends on 7, which does not exist"),
    ],
)
def test_other_tables_are_refused_in_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "dpg_bench.csv", rows))
    with pytest.raises(UserError, match="questions= to DPG-Bench's"):
        read_questions(tmp_path / "nowhere.csv")


def as_published(rows, answers, *, images):
    """The published script's arithmetic as one loop over plain lists: overall, and level 1 by category."""
    items = {}
    for item, number, dependency, category in rows[1:]:
        items.setdefault(item, []).append(
            (number, [int(part) for part in dependency.split(",")], category.split(" (")[0])
        )
    overall, categories = [], {}
    for item, asked in items.items():
        try:
            per_image = []
            for image in range(images):
                raw = {number: float(answers[item, image, number]) for number, _, _ in asked}
                kept = dict(raw)
                for number, parents, _ in asked:
                    for parent in parents:
                        if parent and kept[parent] == 0:
                            kept[number] = 0.0
                            break
                per_image.append(sum(kept.values()) / len(kept))
        except KeyError:
            continue
        overall.append(sum(per_image) / len(per_image))
        for number, _, category in asked:
            categories.setdefault(category.split("-")[0].strip(), []).append(raw[number])
    return sum(overall) / len(overall), {name: sum(values) / len(values) for name, values in categories.items()}


@pytest.mark.parametrize("seed", range(10))
def test_official_counting_agrees_with_a_second_implementation(tmp_path, seed):
    generator = random.Random(seed)
    rows, kinds = [], ["entity - whole", "attribute - color", "relation - spatial", "global -", "other - count"]
    for item in range(8):
        numbers = list(range(1, generator.randint(2, 9)))
        for number in numbers:
            parents = sorted(generator.sample(numbers, k=generator.randint(0, min(2, len(numbers))))) or [0]
            rows.append((f"i{item}", number, ",".join(map(str, parents)), f"{generator.choice(kinds)} (x)"))
    answers = {(item, image, number): generator.random() < 0.7 for item, number, _, _ in rows for image in range(4)}
    questions = read_questions(write(tmp_path / "dpg_bench.csv", rows), official=True)
    answered = {
        item: AnsweredPrompt(
            asked,
            [{question.number: answers[item, image, question.number] for question in asked} for image in range(4)],
        )
        for item, asked in questions.items()
    }
    result = evaluate(answered, official=True)
    overall, categories = as_published(rows, answers, images=4)
    assert sum(result.by_prompt.values()) / len(result.by_prompt) == pytest.approx(overall, abs=1e-12)
    shares = {name: sum(values) / len(values) for name, values in result.by_level_1.items()}
    assert shares == pytest.approx(categories, abs=1e-12)
