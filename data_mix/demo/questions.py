"""Questions about scenes and digits, with exact answers of one word or phrase, derived from what is drawn.

Every kind has one form of question, so that a small model learns the words in minutes, and only questions with one
answer are asked.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_mix.demo.digits import CLASS_NAMES
from data_mix.demo.scene_prompts import COLOURS, MIRRORED, PLURALS, RELATIONS, SHAPES, ObjectDemand, noun_phrase
from data_mix.demo.scenes import CLEAR_OFFSET, Draw, SceneObject, captions, relation_of

EXTREMES = {"left of": "leftmost", "right of": "rightmost", "above": "topmost", "below": "lowest"}
SIDES = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}

TELLING = ("extreme", "two hops", "caption")
"""Kinds whose text or answer says how two shapes lie, or the colour of one: of increasing detail."""
PREFERRED = ("relation", "place", "extreme", "side")
"""Kinds about where shapes lie. They fit fewer scenes and are learned last, so they are asked more often."""
PREFERENCE = 2.5
"""What the ranks of these kinds are divided by; the lowest ranks are chosen."""


class Question(NamedTuple):
    """A question of a kind and its answer."""

    kind: str
    text: str
    answer: str


def scene_questions(objects: Sequence[SceneObject], *, draw: Draw) -> Iterator[Question]:
    """A question of each kind that fits the scene (`_draw_scene`): equal objects, or two of other shape and colour.

    draw: of the size of the scene.
    """
    one, kinds = draw.choice(objects), {(o.colour, o.shape) for o in objects}
    shapes = {shape for _, shape in kinds}
    equal = len(objects) > 1 and len(kinds) == 1
    noun = f"are the {PLURALS[one.shape]}" if equal else f"is the {one.shape}"
    yield Question("count", "How many shapes are there?", str(len(objects)))
    yield Question("colour", f"What colour {noun}?", one.colour)
    yield Question("shape", f"What shape is {one.colour}?", one.shape)

    asked = draw.choice(((one.colour, one.shape), (one.colour, draw.choice(SHAPES)), (draw.choice(COLOURS), one.shape)))
    phrase = noun_phrase(ObjectDemand(asked[1], asked[0]))
    yield Question("exists", f"Is there {phrase}?", _yes(asked in kinds))

    other = draw.choice([shape for shape in SHAPES if shape != one.shape])
    pair = (one.shape, other) if draw.integer(0, 1) else (other, one.shape)
    first, second = (sum(o.shape == shape for o in objects) for shape in pair)
    comparisons = (
        ("more", "than", first > second),
        ("fewer", "than", first < second),
        ("as many", "as", first == second),
    )
    words, particle, holds = draw.choice(comparisons)
    text = f"Are there {words} {PLURALS[pair[0]]} {particle} {PLURALS[pair[1]]}?"
    yield Question("compare", text, _yes(holds))

    absent = draw.choice([shape for shape in SHAPES if shape not in shapes])
    verb, noun = (("is", absent), ("are", PLURALS[absent]))[draw.integer(0, 1)]
    yield Question("premise", f"What colour {verb} the {noun}?", f"there {verb} no {noun}")

    middle = draw.size / 2
    across, down = (abs(place - middle) for place in one.centre)
    if not equal and abs(across - down) >= draw.scaled(CLEAR_OFFSET):
        yield Question("side", f"Where is the {one.shape}?", SIDES[relation_of(one.centre, (middle, middle))])
    yield Question("caption", "What does the image show?", captions(objects)[0])
    if len(kinds) > 1:
        yield from _pair_questions(objects, draw=draw)


def _pair_questions(objects: Sequence[SceneObject], *, draw: Draw) -> Iterator[Question]:
    first, second = objects if draw.integer(0, 1) else objects[::-1]
    relation = relation_of(first.centre, second.centre)
    asked = draw.choice((relation, MIRRORED[relation], draw.choice(RELATIONS)))
    right, below = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    offset = {"left of": -right, "right of": right, "above": -below, "below": below}[asked]
    if offset > 0 and asked != relation:  # far above and a little left of it: "left of" is neither right nor wrong
        asked = MIRRORED[asked]
    yield Question("relation", f"Is the {first.shape} {asked} the {second.shape}?", _yes(asked == relation))
    yield Question("place", f"Where is the {first.shape} from the {second.shape}?", relation)
    yield Question("extreme", f"What is the {EXTREMES[relation]} shape?", first.shape)
    known = noun_phrase(ObjectDemand(second.shape, second.colour)).partition(" ")[2]
    yield Question("two hops", f"What colour is the shape {relation} the {known}?", first.colour)


def digit_questions(value: int, *, draw: Draw) -> Iterator[Question]:
    """A question of each kind about a digit."""
    asked = draw.choice((value, draw.integer(0, 9)))
    yield Question("digit", "Which digit is it?", CLASS_NAMES[value])
    yield Question("is", f"Is it {CLASS_NAMES[asked]}?", _yes(asked == value))
    yield Question("odd", "Is it odd?", _yes(value % 2 == 1))
    limit = draw.integer(1, 8)
    yield Question("larger", f"Is it larger than {CLASS_NAMES[limit]}?", _yes(value > limit))


def choose(questions: Iterator[Question], *, draw: Draw, least: int = 3, most: int = 6) -> list[Question]:
    """`least` to `most` of the questions, in a drawn order; those that tell what others ask come last."""
    ranked = sorted(questions, key=lambda one: draw.random() / (PREFERENCE if one.kind in PREFERRED else 1))
    chosen = ranked[: draw.integer(least, most)]
    return sorted(chosen, key=lambda question: TELLING.index(question.kind) if question.kind in TELLING else -1)


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"
