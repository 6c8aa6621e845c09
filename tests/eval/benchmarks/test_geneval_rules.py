"""GenEval's rules on objects placed by hand."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.geneval_rules import COLOURS, RELATIONS, TAGS, DetectedObject, read_requirement, relations, verdict

METADATA = Path(__file__).parents[4] / "shared/data/prompts/geneval_evaluation_metadata.jsonl"


def box(x, y, *, side=10):
    return (x, y, x + side, y + side)


def detected(name, *, at=(0, 0), score=0.95, color=""):
    return DetectedObject(name, score, box(*at), color)


def requirement(tag, *include, exclude=()):
    record = {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}
    return read_requirement({key: value for key, value in record.items() if value})


def group(name, count=1, **more):
    return {"class": name, "count": count, **more}


ONE, TWO = requirement("single_object", group("dog")), requirement("two_object", group("dog"), group("cat"))
COLOURED = requirement("color_attr", group("dog", color="red"), group("cat", color="blue"))
SWAPPED = ["expected 1 red dog, found 0", "expected 1 blue cat, found 0"]


@pytest.mark.parametrize(
    ("wanted", "objects", "reasons"),
    [
        (ONE, [detected("dog")], []),
        (ONE, [detected("dog"), detected("dog", at=(50, 0)), detected("cat")], []),
        (ONE, [], ["expected 1 dog, found 0"]),
        (ONE, [detected("cat")], ["expected 1 dog, found 0"]),
        (ONE, [detected("dog", score=0.3)], ["expected 1 dog, found 0"]),
        (ONE, [detected("dog", score=0.301)], []),
        (TWO, [detected("dog"), detected("cat")], []),
        (TWO, [detected("dog")], ["expected 1 cat, found 0"]),
        (COLOURED, [detected("dog", color="red"), detected("cat", color="blue")], []),
        (COLOURED, [detected("dog", color="blue"), detected("cat", color="red")], SWAPPED),
    ],
)
def test_objects_and_their_colours(wanted, objects, reasons):
    assert verdict(wanted, objects) == (not reasons, reasons)


@pytest.mark.parametrize(("count", "right"), [(1, False), (2, True), (3, False), (4, False)])
def test_counting_is_exact_and_asks_for_surer_objects(count, right):
    two = requirement("counting", group("dog", 2), exclude=[group("dog", 3)])
    assert verdict(two, [detected("dog", at=(20 * i, 0), score=0.91) for i in range(count)]).correct is right
    unsure = [detected("dog", at=(20 * i, 0), score=0.9) for i in range(5)]
    assert verdict(two, [detected("dog", score=0.95), detected("dog", score=0.95), *unsure]).correct
    assert not verdict(two, unsure).correct


def test_at_most_sixteen_of_a_class_count():
    crowd = [detected("dog", score=0.95) for _ in range(40)]
    for limit, right in ((16, False), (17, True)):
        wanted = requirement("counting", group("dog", 4), exclude=[group("dog", limit)])
        assert verdict(wanted, crowd).correct is right


@pytest.mark.parametrize("color", COLOURS)
def test_colours(color):
    wanted = requirement("colors", group("dog", color=color))
    other = COLOURS[COLOURS.index(color) - 1]
    assert verdict(wanted, [detected("dog", color=color)]).correct
    assert verdict(wanted, [detected("dog", color=other)]).reasons == [f"expected 1 {color} dog, found 0"]
    # Only the surest dog is asked: a right one behind it does not help.
    assert not verdict(wanted, [detected("dog", color=other), detected("dog", color=color, score=0.5)]).correct
    assert verdict(wanted, [detected("dog", color=other, score=0.5), detected("dog", color=color)]).correct


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((-50, 0), {"left of"}),
        ((50, 0), {"right of"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((-50, -50), {"left of", "above"}),
        ((50, 50), {"right of", "below"}),
        ((50, 20), {"right of"}),
        ((0, 0), set()),
        ((2, 0), set()),  # a tenth of both sides together
        ((2.5, 0), set()),  # the remaining offset is a fifth of it
        ((4.5, 0), {"right of"}),  # 2.5 of 4.5
        ((4, 0), set()),  # just half is not more than half
    ],
)
def test_relations_of_boxes(at, expected):
    assert relations(box(*at), box(0, 0)) == expected
    assert relations(box(0, 0), box(*at)) == {RELATIONS[RELATIONS.index(each) ^ 1] for each in expected}


@pytest.mark.parametrize(("relation", "x", "y"), zip(RELATIONS, (-50, 50, 0, 0), (0, 0, -50, 50), strict=True))
def test_position(relation, x, y):
    wanted = requirement("position", group("dog"), group("cat", position=[relation, 0]))
    assert verdict(wanted, [detected("dog"), detected("cat", at=(x, y))]).correct
    (reason,) = verdict(wanted, [detected("dog"), detected("cat", at=(-x, -y))]).reasons
    assert reason.startswith(f"expected cat {relation} dog, found ")
    without_dog = ["expected 1 dog, found 0", f"no target for cat to be {relation}"]
    assert verdict(wanted, [detected("cat", at=(x, y))]).reasons == without_dog


def test_every_member_stands_in_relation_to_every_target():
    wanted = requirement("position", group("dog", 2), group("cat", 2, position=["right of", 0]))
    dogs = [detected("dog", at=(0, 0)), detected("dog", at=(40, 0))]
    assert verdict(wanted, [*dogs, detected("cat", at=(100, 0)), detected("cat", at=(140, 0))]).correct
    assert not verdict(wanted, [*dogs, detected("cat", at=(20, 0)), detected("cat", at=(140, 0))]).correct


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"tag": "colors", "include": [], "prompt": "p"},
        {"tag": "other", "include": [group("dog")], "prompt": "p"},
        {"tag": "colors", "include": [group("dog", color="grey")], "prompt": "p"},
        {"tag": "position", "include": [group("dog"), group("cat", position=["near", 0])], "prompt": "p"},
        {"tag": "position", "include": [group("dog", position=["above", 0])], "prompt": "p"},
        {"tag": "single_object", "include": [{"class": "dog"}], "prompt": "p"},
        {"tag": "single_object", "include": [group(["dog"])], "prompt": "p"},
        {"tag": "single_object", "include": [group("dog", 0)], "prompt": "p"},
        {"tag": "position", "include": [group("dog"), group("cat", position=["above", 0.5])], "prompt": "p"},
    ],
)
def test_other_metadata_is_refused(record):
    with pytest.raises((KeyError, ValueError, TypeError)):
        read_requirement(record)


def test_the_published_metadata_is_understood():
    if not METADATA.exists():
        pytest.skip(f"{METADATA.name} is not here")
    from eval.benchmarks.detector import CLASSES

    requirements = [read_requirement(json.loads(line)) for line in METADATA.read_text().splitlines()]
    for requirement in requirements:
        assert {group.name for group in (*requirement.include, *requirement.exclude)} <= set(CLASSES)
    tags = [requirement.tag for requirement in requirements]
    assert [tags.count(tag) for tag in TAGS] == [80, 99, 80, 94, 100, 100] and len(CLASSES) == 80
