"""GenEval's rules on objects placed by hand, and against a second implementation on random ones."""

import json
import random
from pathlib import Path

import pytest

from eval.benchmarks.geneval_rules import (
    COLOURS,
    RELATIONS,
    TAGS,
    DetectedObject,
    confident,
    read_requirement,
    relations,
    verdict,
)

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


ONE_DOG = requirement("single_object", group("dog"))


@pytest.mark.parametrize(
    ("objects", "right"),
    [
        ([detected("dog")], True),
        ([detected("dog"), detected("dog", at=(50, 0)), detected("cat")], True),
        ([], False),
        ([detected("cat")], False),
        ([detected("dog", score=0.3)], False),
        ([detected("dog", score=0.301)], True),
    ],
)
def test_single_object(objects, right):
    assert verdict(ONE_DOG, objects).correct is right


def test_two_objects_need_both_and_say_which_is_missing():
    two = requirement("two_object", group("dog"), group("cat"))
    assert verdict(two, [detected("dog"), detected("cat")]).correct
    assert verdict(two, [detected("dog")]).reasons == ["expected 1 cat, found 0"]


@pytest.mark.parametrize(("count", "right"), [(1, False), (2, True), (3, False), (4, False)])
def test_counting_is_exact_and_asks_for_surer_objects(count, right):
    two = requirement("counting", group("dog", 2), exclude=[group("dog", 3)])
    assert verdict(two, [detected("dog", at=(20 * i, 0), score=0.91) for i in range(count)]).correct is right
    unsure = [detected("dog", at=(20 * i, 0), score=0.9) for i in range(5)]
    assert verdict(two, [detected("dog", score=0.95), detected("dog", score=0.95), *unsure]).correct
    assert not verdict(two, unsure).correct


def test_at_most_sixteen_of_a_class_count():
    crowd = [detected("dog", score=0.95) for _ in range(40)]
    assert len(confident(crowd, tag="counting")["dog"]) == 16
    assert verdict(requirement("counting", group("dog", 4), exclude=[group("dog", 17)]), crowd).correct


@pytest.mark.parametrize("color", COLOURS)
def test_colours(color):
    wanted = requirement("colors", group("dog", color=color))
    other = COLOURS[COLOURS.index(color) - 1]
    assert verdict(wanted, [detected("dog", color=color)]).correct
    assert verdict(wanted, [detected("dog", color=other)]).reasons == [f"expected 1 {color} dog, found 0"]
    # Only the surest dog is asked: a right one behind it does not help.
    assert not verdict(wanted, [detected("dog", color=other), detected("dog", color=color, score=0.5)]).correct
    assert verdict(wanted, [detected("dog", color=other, score=0.5), detected("dog", color=color)]).correct


def test_attributes_belong_to_their_own_object():
    both = requirement("color_attr", group("dog", color="red"), group("cat", color="blue"))
    assert verdict(both, [detected("dog", color="red"), detected("cat", color="blue")]).correct
    assert not verdict(both, [detected("dog", color="blue"), detected("cat", color="red")]).correct


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


@pytest.mark.parametrize(
    ("relation", "at"), [("left of", (-50, 0)), ("right of", (50, 0)), ("above", (0, -50)), ("below", (0, 50))]
)
def test_position(relation, at):
    wanted = requirement("position", group("dog"), group("cat", position=[relation, 0]))
    assert verdict(wanted, [detected("dog"), detected("cat", at=at)]).correct
    wrong = verdict(wanted, [detected("dog"), detected("cat", at=(-at[0], -at[1]))])
    assert not wrong.correct and wrong.reasons[0].startswith(f"expected cat {relation} dog, found ")
    assert verdict(wanted, [detected("cat", at=at)]).reasons == [
        "expected 1 dog, found 0",
        f"no target for cat to be {relation}",
    ]


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


def second_opinion(record, objects):
    """The same rules written again as one loop with flags over plain lists."""
    least = 0.9 if record["tag"] == "counting" else 0.3
    by_class = {}
    for one in sorted(objects, key=lambda one: one.score, reverse=True):
        if one.score > least and len(by_class.setdefault(one.name, [])) < 16:
            by_class[one.name].append(one)
    ok, groups = True, []
    for wanted in record["include"]:
        mine, good = by_class.get(wanted["class"], [])[: wanted["count"]], True
        enough = len(mine) >= wanted["count"]
        if enough and "color" in wanted:
            enough = sum(one.color == wanted["color"] for one in mine) >= wanted["count"]
        if not enough:
            good = False
        elif "position" in wanted:
            relation, index = wanted["position"]
            good = groups[index] is not None and all(holds(relation, a.box, b.box) for a in mine for b in groups[index])
        groups.append(mine if good else None)
        ok = ok and good
    return ok and not any(len(by_class.get(one["class"], [])) >= one["count"] for one in record.get("exclude", []))


def holds(relation, a, b):
    """One axis at a time: is the shrunk offset along it more than half of the whole distance?"""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    centre = [((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) for i in (0, 1)]
    size = (a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis])
    left = sign * centre[axis] - 0.1 * size
    return left > 1e-3 and left / (centre[0] ** 2 + centre[1] ** 2) ** 0.5 > 0.5


def test_a_second_implementation_agrees_on_random_images():
    generator, right = random.Random(0), 0
    names = ["dog", "cat"]
    for _ in range(4000):
        include = [group(generator.choice(names), generator.choice([1, 1, 2]))]
        if generator.random() < 0.7:
            include.append(group(generator.choice(names)))
        if generator.random() < 0.4:
            include[0]["color"] = generator.choice(COLOURS[:2])
        if len(include) > 1 and generator.random() < 0.5:
            include[1]["position"] = [generator.choice(RELATIONS), 0]
        record = {"tag": generator.choice(TAGS), "include": include, "prompt": "p"}
        if generator.random() < 0.3:
            record["exclude"] = [group(include[0]["class"], include[0]["count"] + 1)]
        objects = []
        for _ in range(generator.randint(0, 6)):
            x, y = generator.randint(0, 60), generator.randint(0, 60)
            place = (x, y, x + generator.randint(5, 40), y + generator.randint(5, 40))
            score = generator.choice([0.2, 0.5, 0.95]) + generator.random() / 100
            objects.append(DetectedObject(generator.choice(names), score, place, generator.choice(COLOURS[:2])))
        expected = second_opinion(record, objects)
        assert verdict(read_requirement(record), objects).correct is expected, (record, objects)
        right += expected
    assert 400 < right < 3000, "both outcomes are common"
