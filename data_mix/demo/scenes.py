"""Procedural scenes: coloured shapes on a plain background, with captions that say exactly what is visible.

A scene is a function of (seed, split, index), so the data set needs no files and any number of processes agree on it.
The captions cover the six skills of GenEval (arXiv:2310.11513): single_object, two_object, counting, colors, position
and color_attr. `data_mix.demo.scene_checker` checks generated images from their pixels alone.

Shape legend: H, W = image height and width, S = side of one object's box, all in pixels.
"""

import functools
import random
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from data_mix.demo.scene_prompts import (
    COLOURS,
    MIRRORED,
    SHAPES,
    Colour,
    Demands,
    ObjectDemand,
    Relation,
    Shape,
    prompt_text,
)
from data_mix.samples import Sample, Split
from um3.core.seeds import derive_seed

# Far apart from each other and from the background in RGB (closest pair: orange and yellow, 87), so that a
# reconstruction at 25 dB (an error of about 14 per channel) still shows the right colour.
PALETTE: dict[Colour, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (245, 220, 30),
    "green": (35, 160, 65),
    "blue": (35, 80, 220),
    "purple": (125, 40, 165),
    "pink": (255, 125, 195),
    "black": (20, 20, 20),
}
BACKGROUND: tuple[int, int, int] = (245, 243, 238)

REFERENCE_SIZE = 32  # every length below is in pixels of a 32-pixel image and scales with the image
MIN_SIZE = 24  # in a smaller image a counted object has fewer than 6 pixels and no clear shape
SINGLE_SIDES = (12, 16)
PAIR_SIDES = (8, 12)
COUNT_SIDES = (8, 8)
STEP = 4  # sides and positions are whole steps from the smallest, so that a small model learns them in minutes
GAP = 2  # between the boxes of two objects
MARGIN = 2  # between a box and the image's border
CLEAR_OFFSET = 4  # the larger offset (horizontal or vertical) exceeds the other by this, so that left/above is clear
SUPERSAMPLING = 8
VAL_EVERY = 8  # one different scene in eight belongs to val, for any seed

SINGLE_SHARE, COUNT_SHARE = 0.20, 0.25  # of the scenes show one object, or equal ones; all others show a pair


class SceneObject(NamedTuple):
    """A shape in the square box [left, left + side) x [top, top + side)."""

    shape: Shape
    colour: Colour
    left: int
    top: int
    side: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.left + self.side / 2, self.top + self.side / 2


class ScenesSource:
    """`length` scenes of `size` x `size` pixels. No val scene is in the train split of any seed."""

    name = "scenes"
    fingerprint: Callable[[], str]

    def __init__(self, *, size: int = 32, length: int = 50_000, seed: int = 0, split: Split = "train") -> None:
        if size < MIN_SIZE:
            raise ValueError(f"size={size}: scenes need at least {MIN_SIZE} pixels to show their shapes")
        if length < 1:
            raise ValueError(f"length={length}: at least one scene is needed")
        self.size, self.length, self.seed = size, length, seed
        self.split: Split = split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        objects = self.objects(index)
        return Sample(self.key(index), render(objects, size=self.size), captions(objects))

    def key(self, index: int) -> str:
        """The key of scene `index`."""
        return f"scenes-{self.split}-{self.seed}-{index:08d}"

    def objects(self, index: int) -> tuple[SceneObject, ...]:
        """The objects of scene `index`; IndexError outside [0, length)."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        draw = Draw(derive_seed(self.seed, "scenes", self.split, index), size=self.size)
        while True:
            objects = _draw_scene(draw)
            # The split depends on the content: two seeds that draw the same scene put it into the same split.
            text = ";".join(f"{o.shape},{o.colour},{o.left},{o.top},{o.side}" for o in sorted(objects))
            if (zlib.crc32(text.encode()) % VAL_EVERY == 0) == (self.split == "val"):
                return objects


Option = TypeVar("Option")


class Draw:
    """Random choices for a scene of `size` pixels, from random() alone: only random() is the same in all Pythons."""

    def __init__(self, seed: int, *, size: int) -> None:
        self.random, self.size = random.Random(seed).random, size
        self.margin, self.step = self.scaled(MARGIN), self.scaled(STEP)

    def scaled(self, length: int) -> int:
        """A length in a 32-pixel image, in whole pixels of this one."""
        return max(1, round(length * self.size / REFERENCE_SIZE))

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included."""
        return low + int(self.random() * (high - low + 1))

    def stepped(self, low: int, high: int) -> int:
        """Uniform among low, low + step, ... up to high."""
        return low + self.step * self.integer(0, (high - low) // self.step)

    def choice(self, options: Sequence[Option]) -> Option:
        return options[self.integer(0, len(options) - 1)]

    def side(self, sides: tuple[int, int]) -> int:
        return self.stepped(self.scaled(sides[0]), self.scaled(sides[1]))

    def place(self, side: int) -> int:
        """The left or upper edge of a box anywhere in the image."""
        return self.stepped(self.margin, self.size - self.margin - side)


def _draw_scene(draw: Draw) -> tuple[SceneObject, ...]:
    """One scene; its objects are in reading order (left or upper first)."""
    point = draw.random()
    if point < SINGLE_SHARE:
        side = draw.side(SINGLE_SIDES)
        left, top = draw.place(side), draw.place(side)
        return (SceneObject(draw.choice(SHAPES), draw.choice(COLOURS), left, top, side),)
    return _draw_count(draw) if point < SINGLE_SHARE + COUNT_SHARE else _draw_pair(draw)


def _draw_count(draw: Draw) -> tuple[SceneObject, ...]:
    """Two to four equal shapes anywhere. If there is no room for the next one, all are drawn again."""
    shape, colour, count = draw.choice(SHAPES), draw.choice(COLOURS), draw.integer(2, 4)
    gap = draw.scaled(GAP)
    placed: list[SceneObject] = []
    misses = 0
    while len(placed) < count:
        side = draw.side(COUNT_SIDES)
        left, top = draw.place(side), draw.place(side)
        if all(
            max(left - o.left - o.side, o.left - left - side, top - o.top - o.side, o.top - top - side) >= gap
            for o in placed
        ):
            placed.append(SceneObject(shape, colour, left, top, side))
        elif (misses := misses + 1) % 8 == 0:
            placed.clear()
    return tuple(sorted(placed, key=lambda o: (o.top, o.left)))


def _draw_pair(draw: Draw) -> tuple[SceneObject, ...]:
    """Two different shapes in two different colours, the first clearly left of or clearly above the second."""
    first_shape, first_colour = draw.choice(SHAPES), draw.choice(COLOURS)
    second_shape = draw.choice([shape for shape in SHAPES if shape != first_shape])
    second_colour = draw.choice([colour for colour in COLOURS if colour != first_colour])
    side_1, side_2 = draw.side(PAIR_SIDES), draw.side(PAIR_SIDES)
    gap = max(draw.step, draw.scaled(GAP))  # a whole step, so that both objects lie on the grid
    horizontal = draw.integer(0, 1) == 0
    while True:
        along_1 = draw.place(side_1 + gap + side_2)
        along_2 = draw.stepped(along_1 + side_1 + gap, draw.size - draw.margin - side_2)
        across_1, across_2 = draw.place(side_1), draw.place(side_2)
        offset_along = along_2 + side_2 / 2 - along_1 - side_1 / 2
        offset_across = abs(across_2 + side_2 / 2 - across_1 - side_1 / 2)
        if offset_along - offset_across >= draw.scaled(CLEAR_OFFSET):
            break
    corner_1, corner_2 = (along_1, across_1), (along_2, across_2)
    if not horizontal:
        corner_1, corner_2 = (across_1, along_1), (across_2, along_2)
    first = SceneObject(first_shape, first_colour, *corner_1, side_1)
    return first, SceneObject(second_shape, second_colour, *corner_2, side_2)


def render(objects: Sequence[SceneObject], *, size: int) -> np.ndarray:
    """The scene as uint8 RGB (size, size, 3). Boxes must not overlap: a patch is pasted with its background."""
    image_HWC = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
    for o in objects:
        image_HWC[o.top : o.top + o.side, o.left : o.left + o.side] = _patch(o.shape, o.colour, o.side)
    return image_HWC


@functools.lru_cache(maxsize=4096)
def _patch(shape: Shape, colour: Colour, side: int) -> np.ndarray:
    return blend(shape_mask(shape, side), ink=PALETTE[colour])


def blend(coverage_HW: np.ndarray, *, ink: tuple[int, int, int]) -> np.ndarray:
    """The background with the share `coverage_HW` of ink in every pixel, uint8 RGB (H, W, 3)."""
    background_3, ink_3 = np.array(BACKGROUND, dtype=np.float32), np.array(ink, dtype=np.float32)
    return np.rint(background_3 + coverage_HW[:, :, None] * (ink_3 - background_3)).astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def shape_mask(shape: Shape, side: int) -> np.ndarray:
    """The share of each pixel that the shape covers: float32 (S, S) in [0, 1]. It touches all sides of its box."""
    steps = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING  # positions of the sub-pixels, in pixels
    x, y = steps[None, :], steps[:, None]
    mask_SS = (
        _inside(shape, x, y, side).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)
    )
    mask_SS.flags.writeable = False  # all callers share the array
    return mask_SS


def _inside(shape: Shape, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    middle = side / 2
    if shape == "circle":
        return (x - middle) ** 2 + (y - middle) ** 2 <= middle**2
    if shape == "square":
        return np.ones((x + y).shape, dtype=bool)
    if shape == "triangle":
        return np.abs(x - middle) <= y / 2
    # The arm of the cross is about a third of the side, with the same parity, so that its edges fall between pixels.
    arm = min((width for width in range(1, side) if (side - width) % 2 == 0), key=lambda w: abs(w - side / 3))
    return (np.abs(x - middle) <= arm / 2) | (np.abs(y - middle) <= arm / 2)


def captions(objects: Sequence[SceneObject]) -> tuple[str, ...]:
    """The captions of a scene in the words of the prompts of the six skills, the most detailed first.

    `objects` in reading order: one object, or equal objects, or two different ones with the left or upper one first. A
    relation is given from both sides; "and" keeps the reading order, so that it is clear which object comes first.
    """
    kinds = [(o.shape, o.colour) for o in objects]
    if len(set(kinds)) == 1:
        shape, colour = kinds[0]
        demands = [Demands((ObjectDemand(shape, name, len(objects)),)) for name in (colour, None)]
        return tuple(map(prompt_text, demands))
    full_1, full_2 = (ObjectDemand(shape, colour) for shape, colour in kinds)
    bare_1, bare_2 = (ObjectDemand(shape) for shape, _ in kinds)
    relation = relation_of(objects[0].centre, objects[1].centre)
    demands = []
    for first, second in ((full_1, full_2), (bare_1, bare_2)):
        demands += [Demands((first, second), relation), Demands((second, first), MIRRORED[relation])]
    return tuple(map(prompt_text, [*demands, Demands((full_1, full_2)), Demands((bare_1, bare_2))]))


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> Relation:
    """The position of the centre (x, y) of `first` as seen from `second`, along the larger offset."""
    offset_x, offset_y = second[0] - first[0], second[1] - first[1]
    if abs(offset_x) > abs(offset_y):
        return "left of" if offset_x > 0 else "right of"
    return "above" if offset_y > 0 else "below"
