"""DPG-Bench's rules by hand."""

import csv

import pytest

from eval.benchmarks.dpg_rules import counted, evaluate, read_questions
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
    categories = ["entity - whole", "attribute - color", "relation - spatial"]
    assert [question.category for question in questions["a"]] == categories
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


def test_the_official_script_reads_its_categories_off_the_last_image_without_dependencies(questions):
    answers = [dict.fromkeys((1, 2, 3), True), {1: False, 2: True, 3: True}]
    result = evaluate(questions, {"a": answers}, official=True)
    assert result.by_prompt == {"a": 0.5}
    assert result.by_level_1 == {"entity": [0], "attribute": [1], "relation": [1]}


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
