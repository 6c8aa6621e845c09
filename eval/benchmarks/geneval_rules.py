"""GenEval's rules (Ghosh et al. 2023): does an image with these objects show what its prompt requires?

Pure functions of the metadata line and the detected objects. Thresholds and tie-breaks are those of GenEval's
evaluation script. Boxes are (left, top, right, bottom) in pixels, y downwards.
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
"""Share of both boxes' sizes that is subtracted from the offset of their centres."""
SETTINGS = {"threshold": THRESHOLD, "counting": COUNTING_THRESHOLD, "max_objects": MAX_OBJECTS, "overlap": OVERLAP}


class DetectedObject(NamedTuple):
    """A detected object; `color` is empty unless the prompt requires a colour."""

    name: str
    score: float
    box: Box
    color: str = ""


class Group(NamedTuple):
    """A required group: `number` objects of a class, perhaps of a colour, or in a relation to an earlier group."""

    name: str
    number: int
    color: str = ""
    relation: str = ""
    target: int = 0


class Requirement(NamedTuple):
    """A line of GenEval's metadata: the groups that must and must not be in the image."""

    tag: str
    prompt: str
    include: list[Group]
    exclude: list[Group]

    @property
    def needs_colour(self) -> bool:
        """Whether a group has a required colour."""
        return any(group.color for group in self.include)


class Verdict(NamedTuple):
    """Whether the image is correct, and the reasons if it is not."""

    correct: bool
    reasons: list[str]


def read_requirement(record: Any) -> Requirement:
    """Read a line of the metadata, as parsed JSON. Raises ValueError, KeyError, TypeError: another form."""
    include = [_group(group, num_earlier=index) for index, group in enumerate(record["include"])]
    exclude = [_group(group, num_earlier=0) for group in record.get("exclude", [])]
    if record["tag"] not in TAGS or not include:
        raise ValueError(f"tag '{record['tag']}' with {len(include)} groups")
    return Requirement(record["tag"], record["prompt"], include, exclude)


def _group(record: Any, *, num_earlier: int) -> Group:
    group = Group(record["class"], int(record["count"]), record.get("color", ""), *record.get("position", ()))
    if not isinstance(group.name, str) or group.number < 1:
        raise ValueError(f"{group.number} objects of class {group.name}")
    if group.color and group.color not in COLOURS:
        raise ValueError(f"unknown colour '{group.color}'")
    if group.relation and (group.relation not in RELATIONS or group.target not in range(num_earlier)):
        raise ValueError(f"unknown position '{group.relation}' of group {group.target}")
    return group._replace(target=int(group.target))


def confident(objects: Sequence[DetectedObject], *, tag: str) -> dict[str, list[DetectedObject]]:
    """The objects above the task's threshold, by class, by falling score; counting has a higher threshold."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    by_class: dict[str, list[DetectedObject]] = {}
    for detected in sorted(objects, key=lambda detected: -detected.score):
        if detected.score > threshold:
            by_class.setdefault(detected.name, []).append(detected)
    return {name: objects[:MAX_OBJECTS] for name, objects in by_class.items()}


def members_of(group: Group, *, by_class: Mapping[str, Sequence[DetectedObject]]) -> list[DetectedObject]:
    """The objects that form a group: the required number of its class with the highest scores."""
    return list(by_class.get(group.name, []))[: group.number]


def verdict(requirement: Requirement, objects: Sequence[DetectedObject]) -> Verdict:
    """Judge an image by its objects."""
    by_class, reasons = confident(objects, tag=requirement.tag), list[str]()
    matched: list[list[DetectedObject] | None] = []
    for group in requirement.include:
        members = members_of(group, by_class=by_class)
        reason = _fault(group, members=members, matched=matched)
        reasons += [reason] if reason else []
        matched.append(None if reason else members)
    for group in requirement.exclude:
        if (count := len(by_class.get(group.name, []))) >= group.number:
            reasons.append(f"expected fewer than {group.number} {group.name}, found {count}")
    return Verdict(not reasons, reasons)


def _fault(
    group: Group, *, members: Sequence[DetectedObject], matched: Sequence[Sequence[DetectedObject] | None]
) -> str:
    """The reason why a group fails; empty if it does not."""
    if len(members) < group.number:
        return f"expected {group.number} {group.name}, found {len(members)}"
    if group.color and (count := sum(member.color == group.color for member in members)) < group.number:
        return f"expected {group.number} {group.color} {group.name}, found {count}"
    if not group.relation:
        return ""
    targets = matched[group.target]
    if targets is None:
        return f"no target for {group.name} to be {group.relation}"
    for member in members:
        for target in targets:
            if group.relation not in (seen := relations(member.box, target.box)):
                seen_text = " and ".join(sorted(seen)) or "-"
                return f"expected {group.name} {group.relation} {target.name}, found {seen_text}"
    return ""


def relations(first: Box, second: Box) -> set[str]:
    """The relations of `first` to `second`; empty if they overlap too much.

    A tenth of both sizes is subtracted from the offset of the centres on each axis. The remaining offset must be more
    than half of the distance of the centres.
    """
    offset = [(first[i] + first[i + 2] - second[i] - second[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(first[i + 2] - first[i]) + abs(second[i + 2] - second[i]) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - OVERLAP * size, 0), o) for o, size in zip(offset, sizes, strict=True)]
    if all(abs(value) < 1e-3 for value in revised):
        return set()
    x, y = (value / math.hypot(*offset) for value in revised)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, is_true in holds.items() if is_true}
