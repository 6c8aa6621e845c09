"""GenEval's rules (Ghosh et al. 2023): does an image with these objects in it show what its prompt demands?

Pure functions of the metadata line and the detected objects; thresholds and tie-breaks are those of its evaluation
script. Boxes are (left, top, right, bottom) in pixels, y downwards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
OVERLAP = 0.1
"""How much of the two sizes together is taken off the distance of two centres before it counts."""
SETTINGS = {"threshold": THRESHOLD, "counting": COUNTING_THRESHOLD, "max_objects": MAX_OBJECTS, "overlap": OVERLAP}


class Found(NamedTuple):
    """A detected object; `color` where its colour was asked for."""

    name: str
    score: float
    box: Box
    color: str = ""


class Group(NamedTuple):
    """What a prompt wants there to be: a `number` of a class, of a colour, in a relation to an earlier group."""

    name: str
    number: int
    color: str = ""
    relation: str = ""
    target: int = 0


class Demand(NamedTuple):
    """A line of GenEval's metadata."""

    tag: str
    prompt: str
    include: list[Group]
    exclude: list[Group]

    @property
    def asks_colour(self) -> bool:
        """Whether a colour has to be told."""
        return any(group.color for group in self.include)


class Verdict(NamedTuple):
    """Whether the image is right, and everything that is wrong with it."""

    correct: bool
    reasons: list[str]


def read_demand(record: Any) -> Demand:
    """A metadata line as parsed JSON.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    include = [_group(each, earlier=index) for index, each in enumerate(record["include"])]
    exclude = [_group(each, earlier=0) for each in record.get("exclude", [])]
    if record["tag"] not in TAGS or not include:
        raise ValueError(f"tag '{record['tag']}' with {len(include)} groups")
    return Demand(record["tag"], record["prompt"], include, exclude)


def _group(record: Any, *, earlier: int) -> Group:
    color = record.get("color", "")
    relation, target = record.get("position", ("", 0))
    if color and color not in COLOURS:
        raise ValueError(f"unknown colour '{color}'")
    if relation and (relation not in RELATIONS or not 0 <= target < earlier):
        raise ValueError(f"unknown position '{relation}' of group {target}")
    return Group(record["class"], int(record["count"]), color, relation, target)


def confident(objects: Sequence[Found], *, tag: str) -> dict[str, list[Found]]:
    """The objects that count, by class, the surest first: counting asks for surer ones."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Found]] = {}
    for each in sorted(objects, key=lambda each: -each.score):
        if each.score > threshold:
            found.setdefault(each.name, []).append(each)
    return {name: group[:MAX_OBJECTS] for name, group in found.items()}


def chosen(group: Group, *, found: Mapping[str, Sequence[Found]]) -> list[Found]:
    """The objects that stand for a group: as many of the surest of its class as are asked for."""
    return list(found.get(group.name, []))[: group.number]


def verdict(demand: Demand, objects: Sequence[Found]) -> Verdict:
    """Judge an image by its objects."""
    found, reasons = confident(objects, tag=demand.tag), list[str]()
    matched: list[list[Found] | None] = []
    for group in demand.include:
        members = chosen(group, found=found)
        wrong = _complaint(group, members=members, matched=matched)
        reasons += [wrong] if wrong else []
        matched.append(None if wrong else members)
    for group in demand.exclude:
        if (count := len(found.get(group.name, []))) >= group.number:
            reasons.append(f"expected fewer than {group.number} {group.name}, found {count}")
    return Verdict(not reasons, reasons)


def _complaint(group: Group, *, members: Sequence[Found], matched: Sequence[Sequence[Found] | None]) -> str:
    """What is wrong with a group; empty when nothing is."""
    if len(members) < group.number:
        return f"expected {group.number} {group.name}, found {len(members)}"
    if group.color and (right := sum(each.color == group.color for each in members)) < group.number:
        return f"expected {group.number} {group.color} {group.name}, found {right}"
    if not group.relation:
        return ""
    targets = matched[group.target]
    if targets is None:
        return f"no target for {group.name} to be {group.relation}"
    for each in members:
        for target in targets:
            if group.relation not in (seen := relations(each.box, target.box)):
                return (
                    f"expected {group.name} {group.relation} {target.name}, found {' and '.join(sorted(seen)) or '-'}"
                )
    return ""


def relations(first: Box, second: Box) -> set[str]:
    """Where `first` lies as seen from `second`; nothing where they overlap too much to tell.

    The offset of the centres loses a tenth of both sizes on each axis; what is left of it has to be more than half of
    the whole distance of the centres.
    """
    offset = [(first[i] + first[i + 2] - second[i] - second[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(first[i + 2] - first[i]) + abs(second[i + 2] - second[i]) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - OVERLAP * size, 0), o) for o, size in zip(offset, sizes, strict=True)]
    if all(abs(value) < 1e-3 for value in revised):
        return set()
    x, y = (value / math.hypot(*offset) for value in revised)
    told = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in told.items() if holds}
