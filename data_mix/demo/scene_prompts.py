"""The language of the scenes: the words, what a prompt demands of an image, and the test prompts.

    "a circle"   "three red circles"   "a circle and a blue square"   "a red circle left of a blue square"

The six skills and the rules for a prompt follow GenEval (arXiv:2310.11513): a number demands exactly that many objects;
anything else demands that an object is there and tolerates others.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

from um3.core.seeds import derive_seed

Shape = Literal["circle", "square", "triangle", "cross"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"]
Relation = Literal["left of", "right of", "above", "below"]
Skill = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SKILLS: tuple[Skill, ...] = get_args(Skill)
MIRRORED: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBER_WORDS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
PLURALS: dict[Shape, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


@dataclass(frozen=True)
class ObjectDemand:
    """An object (at least one), or exactly `count` above one, of this shape, and of this colour unless it is None."""

    shape: Shape
    colour: Colour | None = None
    count: int = 1


@dataclass(frozen=True)
class Demands:
    """What an image must show. `relation`: the position of the first object as seen from the second."""

    objects: tuple[ObjectDemand, ...]
    relation: Relation | None = None


@dataclass(frozen=True)
class ScenePrompt:
    """One test prompt, the skill that it tests, and its demands."""

    skill: Skill
    prompt: str
    demands: Demands


def noun_phrase(demand: ObjectDemand) -> str:
    """ "a red circle", "an orange cross", "three circles"."""
    colour = f"{demand.colour} " if demand.colour else ""
    if demand.count > 1:
        return f"{NUMBER_WORDS[demand.count]} {colour}{PLURALS[demand.shape]}"
    words = f"{colour}{demand.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def prompt_text(demands: Demands) -> str:
    """The prompt for these demands; `parse_prompt` is the inverse."""
    phrases = [noun_phrase(demand) for demand in demands.objects]
    return f" {demands.relation or 'and'} ".join(phrases)


_COUNTS: dict[str, int] = {"a": 1, "an": 1, "one": 1} | {word: count for count, word in NUMBER_WORDS.items()}
_PHRASE = re.compile(rf"({'|'.join(_COUNTS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join((*PLURALS.values(), *SHAPES))})")
_JOINT = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


def parse_prompt(prompt: str) -> Demands:
    """The demands of a prompt in the language of the scenes; ValueError for any other text."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    first, *rest = _JOINT.split(text)
    if len(rest) not in (0, 2):
        raise ValueError(f"{prompt!r} joins more than two objects")
    relation = next((relation for relation in RELATIONS if rest and rest[0] == relation), None)
    objects = []
    for phrase in (first, *rest[1:]):
        match = _PHRASE.fullmatch(phrase)
        if match is None:
            raise ValueError(f"{prompt!r} is not a scene prompt: cannot read {phrase!r}")
        number, colour_word, noun = match.groups()
        count = _COUNTS[number]
        if (noun in PLURALS.values()) != (count > 1):
            raise ValueError(f"{prompt!r} is not a scene prompt: {number!r} does not agree with {noun!r}")
        shape = next(shape for shape in SHAPES if noun in (shape, PLURALS[shape]))
        colour = next((colour for colour in COLOURS if colour == colour_word), None)
        objects.append(ObjectDemand(shape, colour, count))
    return Demands(tuple(objects), relation)


def evaluation_prompts(*, per_skill: int, seed: int) -> list[ScenePrompt]:
    """`per_skill` prompts of every skill, in GenEval's order, drawn without replacement.

    A skill with fewer (4 single_object, 12 counting and two_object) starts over: every skill has the same weight.
    """
    if per_skill < 1:
        raise ValueError(f"per_skill={per_skill}: at least one prompt per skill is needed")
    prompts: list[ScenePrompt] = []
    for skill in SKILLS:
        possible = _possible_demands(skill)
        # Only random() gives the same values in all Python versions; shuffle() does not promise it.
        draw = random.Random(derive_seed(seed, "evaluation_prompts", skill)).random
        order = sorted(range(len(possible)), key=lambda _: draw())
        for position in range(per_skill):
            demands = possible[order[position % len(possible)]]
            prompts.append(ScenePrompt(skill=skill, prompt=prompt_text(demands), demands=demands))
    return prompts


def _possible_demands(skill: Skill) -> list[Demands]:
    """All demands that test `skill` and are possible in a scene."""
    if skill == "single_object":
        return [Demands((ObjectDemand(shape),)) for shape in SHAPES]
    if skill == "counting":
        return [Demands((ObjectDemand(shape, count=count),)) for shape in SHAPES for count in NUMBER_WORDS]
    if skill == "colors":
        return [Demands((ObjectDemand(shape, colour),)) for shape in SHAPES for colour in COLOURS]
    shapes = list(itertools.permutations(SHAPES, 2))
    if skill == "color_attr":
        colours = list(itertools.permutations(COLOURS, 2))
        return [Demands((ObjectDemand(a, c), ObjectDemand(b, d))) for a, b in shapes for c, d in colours]
    relations = RELATIONS if skill == "position" else (None,)
    return [Demands((ObjectDemand(a), ObjectDemand(b)), relation) for a, b in shapes for relation in relations]
