"""GenEval's rules on objects placed by hand, and against a second writing-down of them on random ones."""

import json
import random
from pathlib import Path

import pytest

from eval.benchmarks.geneval_rules import COLOURS, RELATIONS, TAGS, Found, confident, read_demand, relations, verdict

METADATA = Path(__file__).parents[4] / "shared/data/prompts/geneval_evaluation_metadata.jsonl"


def box(x, y, *, side=10):
    return (x, y, x + side, y + side)


def found(name, *, at=(0, 0), score=0.95, color=""):
    return Found(name, score, box(*at), color)


def demand(tag, *include, exclude=()):
    record = {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}
    return read_demand({key: value for key, value in record.items() if value})


def group(name, count=1, **more):
    return {"class": name, "count": count, **more}


ONE_DOG = demand("single_object", group("dog"))


@pytest.mark.parametrize(
    ("objects", "right"),
    [
        ([found("dog")], True),
        ([found("dog"), found("dog", at=(50, 0)), found("cat")], True),
        ([], False),
        ([found("cat")], False),
        ([found("dog", score=0.3)], False),
        ([found("dog", score=0.301)], True),
    ],
)
def test_single_object(objects, right):
    assert verdict(ONE_DOG, objects).correct is right


def test_two_objects_need_both_and_say_which_is_missing():
    two = demand("two_object", group("dog"), group("cat"))
    assert verdict(two, [found("dog"), found("cat")]).correct
    assert verdict(two, [found("dog")]).reasons == ["expected 1 cat, found 0"]


@pytest.mark.parametrize(("count", "right"), [(1, False), (2, True), (3, False), (4, False)])
def test_counting_is_exact_and_asks_for_surer_objects(count, right):
    two = demand("counting", group("dog", 2), exclude=[group("dog", 3)])
    assert verdict(two, [found("dog", at=(20 * i, 0), score=0.91) for i in range(count)]).correct is right
    unsure = [found("dog", at=(20 * i, 0), score=0.9) for i in range(5)]
    assert verdict(two, [found("dog", score=0.95), found("dog", score=0.95), *unsure]).correct
    assert not verdict(two, unsure).correct


def test_at_most_sixteen_of_a_class_count():
    crowd = [found("dog", score=0.95) for _ in range(40)]
    assert len(confident(crowd, tag="counting")["dog"]) == 16
    assert verdict(demand("counting", group("dog", 4), exclude=[group("dog", 17)]), crowd).correct


@pytest.mark.parametrize("color", COLOURS)
def test_colours(color):
    wanted = demand("colors", group("dog", color=color))
    other = COLOURS[COLOURS.index(color) - 1]
    assert verdict(wanted, [found("dog", color=color)]).correct
    assert verdict(wanted, [found("dog", color=other)]).reasons == [f"expected 1 {color} dog, found 0"]
    # Only the surest dog is asked: a right one behind it does not help.
    assert not verdict(wanted, [found("dog", color=other), found("dog", color=color, score=0.5)]).correct
    assert verdict(wanted, [found("dog", color=other, score=0.5), found("dog", color=color)]).correct


def test_attributes_belong_to_their_own_object():
    both = demand("color_attr", group("dog", color="red"), group("cat", color="blue"))
    assert verdict(both, [found("dog", color="red"), found("cat", color="blue")]).correct
    assert not verdict(both, [found("dog", color="blue"), found("cat", color="red")]).correct


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
        ((2.5, 0), set()),  # what is left of the offset is a fifth of it
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
    wanted = demand("position", group("dog"), group("cat", position=[relation, 0]))
    assert verdict(wanted, [found("dog"), found("cat", at=at)]).correct
    wrong = verdict(wanted, [found("dog"), found("cat", at=(-at[0], -at[1]))])
    assert not wrong.correct and wrong.reasons[0].startswith(f"expected cat {relation} dog, found ")
    assert verdict(wanted, [found("cat", at=at)]).reasons == [
        "expected 1 dog, found 0",
        f"no target for cat to be {relation}",
    ]


def test_every_member_stands_in_relation_to_every_target():
    wanted = demand("position", group("dog", 2), group("cat", 2, position=["right of", 0]))
    dogs = [found("dog", at=(0, 0)), found("dog", at=(40, 0))]
    assert verdict(wanted, [*dogs, found("cat", at=(100, 0)), found("cat", at=(140, 0))]).correct
    assert not verdict(wanted, [*dogs, found("cat", at=(20, 0)), found("cat", at=(140, 0))]).correct


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
def test_what_is_no_metadata_is_refused(record):
    with pytest.raises((KeyError, ValueError, TypeError)):
        read_demand(record)


def test_the_published_metadata_is_understood():
    if not METADATA.exists():
        pytest.skip(f"{METADATA.name} is not here")
    from eval.benchmarks.detector import CLASSES

    demands = [read_demand(json.loads(line)) for line in METADATA.read_text().splitlines()]
    counts = dict.fromkeys(TAGS, 0)
    for each in demands:
        counts[each.tag] += 1
        assert {one.name for one in (*each.include, *each.exclude)} <= set(CLASSES)
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len(CLASSES) == 80


def second_opinion(record, objects):
    """The same rules told anew, as one walk with flags, on plain lists."""
    least = 0.9 if record["tag"] == "counting" else 0.3
    by_class = {}
    for each in sorted(objects, key=lambda each: each.score, reverse=True):
        if each.score > least and len(by_class.setdefault(each.name, [])) < 16:
            by_class[each.name].append(each)
    ok, groups = True, []
    for wanted in record["include"]:
        mine, good = by_class.get(wanted["class"], [])[: wanted["count"]], True
        enough = len(mine) >= wanted["count"]
        if enough and "color" in wanted:
            enough = sum(each.color == wanted["color"] for each in mine) >= wanted["count"]
        if not enough:
            good = False
        elif "position" in wanted:
            relation, index = wanted["position"]
            good = groups[index] is not None and all(holds(relation, a.box, b.box) for a in mine for b in groups[index])
        groups.append(mine if good else None)
        ok = ok and good
    return ok and not any(len(by_class.get(each["class"], [])) >= each["count"] for each in record.get("exclude", []))


def holds(relation, a, b):
    """One axis at a time: is the shrunk offset along it more than half of the whole distance?"""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    centre = [((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) for i in (0, 1)]
    size = (a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis])
    left = sign * centre[axis] - 0.1 * size
    return left > 1e-3 and left / (centre[0] ** 2 + centre[1] ** 2) ** 0.5 > 0.5


def test_two_writings_of_the_rules_agree_on_random_images():
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
            objects.append(Found(generator.choice(names), score, place, generator.choice(COLOURS[:2])))
        expected = second_opinion(record, objects)
        assert verdict(read_demand(record), objects).correct is expected, (record, objects)
        right += expected
    assert 400 < right < 3000, "both outcomes are common"
