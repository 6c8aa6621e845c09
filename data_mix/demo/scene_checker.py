"""The checker of generated scenes: from the pixels of an image to its objects, and from the objects to a verdict.

It reads nothing but the image. It also works on reconstructions (about 25 dB), where a blurred red edge lies on the
straight line in RGB from the background to red. So a pixel is compared with these lines; the closest palette colour
alone would find a pink ring around every red object.

Shape legend: H, W = image, N = pixels of one region, C = palette colours, S = side of a box.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from data_mix.demo.scene_prompts import (
    COLOURS,
    NUMBER_WORDS,
    SHAPES,
    Colour,
    Demands,
    ObjectDemand,
    Relation,
    Shape,
    noun_phrase,
    prompt_text,
)
from data_mix.demo.scenes import BACKGROUND, PALETTE, REFERENCE_SIZE, SceneObject, captions, relation_of, shape_mask

MAX_SIZE = 64  # larger images are shrunk to this size; shapes need no more, and the search stays fast
BACKGROUND_DISTANCE = 45.0  # RGB distance from the background from which a pixel may belong to an object
FULL_COVERAGE = 0.5  # share of a pixel that must be ink for it to count as part of the object
MIN_AREA = 12.0  # pixels at 32 x 32; the smallest shape in a scene, a cross of side 8, covers 28
MAX_RESIDUAL = 28.0  # RGB rms distance from the line of one colour above which a region may hold two colours
MIN_GAIN = 2.0  # factor in squared distance by which two colours must explain such a region better
FOREIGN_RESIDUAL = 60.0  # RGB rms distance above which a region has no palette colour (noise has about 100)
SHARPENING = 3.0  # contrast of coverage around one half before shapes are compared; it removes some of a blur
BLUR = 0.9  # pixels at 32 x 32; shapes are compared with templates as rendered and with blurred ones
MIN_IOU = 0.55  # overlap with the best template, below which a region is not a shape
MIN_OFFSET = 3.0  # pixels at 32 x 32 between two centres for a relation to hold; scenes have at least 12

BACKGROUND_3 = np.array(BACKGROUND, dtype=np.float32)
LINE_C3 = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float32) - BACKGROUND_3


class Detection(NamedTuple):
    """One detected object, in pixels of the image: its box (left, top, right, bottom), right and bottom excluded, the
    centre (x, y) of the box, and its overlap (IoU) with the best template."""

    shape: Shape
    colour: Colour
    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    score: float


class Verdict(NamedTuple):
    """passed: all demands are met. demands_met: whether each one is, by its text."""

    passed: bool
    demands_met: dict[str, bool]


def detect(image: np.ndarray) -> list[Detection]:
    """The objects in a uint8 RGB (H, W, 3) image, in reading order of their boxes."""
    shrink = max(1.0, max(image.shape[:2]) / MAX_SIZE)
    if shrink > 1:
        smaller = (round(image.shape[1] / shrink), round(image.shape[0] / shrink))
        image = np.asarray(Image.fromarray(image).resize(smaller, Image.Resampling.BOX))
    scale = max(image.shape[:2]) / REFERENCE_SIZE
    offset_HW3 = image.astype(np.float32) - BACKGROUND_3
    region_HW, _ = ndimage.label((offset_HW3**2).sum(axis=2) > BACKGROUND_DISTANCE**2)
    detections: list[Detection] = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(region_HW), start=1):
        inside_HW = region_HW[rows, columns] == number
        if inside_HW.sum() >= MIN_AREA * scale**2:
            for colour, coverage_HW in _split_by_colour(offset_HW3[rows, columns], inside_HW, scale=scale):
                detections += _objects(coverage_HW, colour, top=rows.start, left=columns.start, scale=scale)
    for place, detection in enumerate(detections):
        left, top, right, bottom = (round(edge * shrink) for edge in detection.box)
        centre = (detection.centre[0] * shrink, detection.centre[1] * shrink)
        detections[place] = detection._replace(box=(left, top, right, bottom), centre=centre)
    return sorted(detections, key=lambda detection: (detection.box[1], detection.box[0]))


def _split_by_colour(offset_HW3: np.ndarray, inside_HW: np.ndarray, *, scale: float) -> list[tuple[Colour, np.ndarray]]:
    """The colours in one connected region, each with the share of every pixel that it covers, (H, W) in [0, 1].

    One colour if its line explains the region, else the two colours that explain it best together, if each has enough
    pixels for an object (objects that touch in a bad reconstruction). No colour if no line is close.
    """
    offset_N3 = offset_HW3[inside_HW]
    coverage_NC, squared_NC = _distances_to_lines(offset_N3)
    total_C = squared_NC.sum(axis=0)
    single = int(total_C.argmin())
    coverage_HW = np.zeros(inside_HW.shape, dtype=np.float32)
    pairs = list(itertools.combinations(range(len(COLOURS)), 2))
    total_of_pair = [float(squared_NC[:, pair].min(axis=1).sum()) for pair in pairs]
    limit = max(MIN_GAIN * min(total_of_pair), len(offset_N3) * MAX_RESIDUAL**2)
    if total_C[single] > limit:
        best = pairs[int(np.argmin(total_of_pair))]
        choice_N = squared_NC[:, best].argmin(axis=1)
        parts: list[tuple[Colour, np.ndarray]] = []
        for position, index in enumerate(best):
            part_HW = coverage_HW.copy()
            part_HW[inside_HW] = np.where(choice_N == position, coverage_NC[:, index], 0)
            if part_HW.sum() >= MIN_AREA * scale**2:
                parts.append((COLOURS[index], part_HW))
        if len(parts) == 2 and min(total_of_pair) < len(offset_N3) * FOREIGN_RESIDUAL**2:
            return parts
    if total_C[single] > len(offset_N3) * FOREIGN_RESIDUAL**2:
        return []
    coverage_HW[inside_HW] = coverage_NC[:, single]
    return [(COLOURS[single], coverage_HW)]


def _distances_to_lines(offset_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (N, C) and squared RGB distance (N, C) of each pixel to the line from background to each colour."""
    coverage_NC = np.clip(offset_N3 @ LINE_C3.T / (LINE_C3**2).sum(axis=1), 0, 1)
    residual_NC3 = offset_N3[:, None] - coverage_NC[:, :, None] * LINE_C3
    return coverage_NC, (residual_NC3**2).sum(axis=2)


def _objects(coverage_HW: np.ndarray, colour: Colour, *, top: int, left: int, scale: float) -> list[Detection]:
    """The connected solid parts of one colour's coverage, each with the shape that fits best."""
    part_HW, _ = ndimage.label(coverage_HW > FULL_COVERAGE)
    detections = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(part_HW), start=1):
        part = part_HW[rows, columns] == number
        if part.sum() < MIN_AREA * scale**2:
            continue
        # A rim of one pixel around the part holds the half-covered edge pixels of its shape.
        other_HW = (part_HW > 0) & (part_HW != number)
        padded_HW = np.pad(np.where(other_HW, 0, coverage_HW), 1)
        rim_HW = padded_HW[rows.start : rows.stop + 2, columns.start : columns.stop + 2]
        shape, score = _best_shape(rim_HW, scale=scale)
        if score >= MIN_IOU:
            y_1, x_1, y_2, x_2 = top + rows.start, left + columns.start, top + rows.stop, left + columns.stop
            centre = ((x_1 + x_2) / 2, (y_1 + y_2) / 2)
            detections.append(Detection(shape, colour, (x_1, y_1, x_2, y_2), centre, score))
    return detections


def _best_shape(coverage_HW: np.ndarray, *, scale: float) -> tuple[Shape, float]:
    """The shape whose template overlaps best with a region and its rim of one pixel, over sides and positions near."""
    coverage_HW = _sharpened(coverage_HW)
    longest = max(coverage_HW.shape) - 2
    reach = max(1, round(scale))
    total = float(coverage_HW.sum())
    best: tuple[Shape, float] = (SHAPES[0], 0.0)
    # A blurred triangle loses up to two pixels of its side at the apex, so the search includes larger sides.
    for side in range(max(3, longest - reach), longest + 2 * reach + 1):
        canvas = np.pad(coverage_HW, max(0, side + 2 - min(coverage_HW.shape)) + 1)
        windows = np.lib.stride_tricks.sliding_window_view(canvas, (side + 2, side + 2))
        near = windows[_middle(windows.shape[0], reach=reach), _middle(windows.shape[1], reach=reach)]
        for shape, template_SS in _templates(side, blur=BLUR * scale):
            shared = float(np.minimum(near, template_SS).sum(axis=(2, 3)).max())
            score = shared / (total + float(template_SS.sum()) - shared)
            if score > best[1]:
                best = (shape, score)
    return best


def _middle(length: int, *, reach: int) -> slice:
    """The positions at most `reach` from the middle of `length` positions (half a step more if it is even)."""
    return slice(max(0, (length - 1) // 2 - reach), min(length, length // 2 + reach + 1))


@functools.lru_cache(maxsize=256)
def _templates(side: int, *, blur: float) -> list[tuple[Shape, np.ndarray]]:
    """Every shape with a rim of one pixel, (side + 2, side + 2): as rendered, and blurred by `blur` pixels."""
    masks = [(shape, np.pad(shape_mask(shape, side), 1), sigma) for shape in SHAPES for sigma in (0.0, blur)]
    return [(shape, _sharpened(ndimage.gaussian_filter(mask, sigma, mode="constant"))) for shape, mask, sigma in masks]


def _sharpened(coverage: np.ndarray) -> np.ndarray:
    return np.clip((coverage - 0.5) * SHARPENING + 0.5, 0, 1)


def check(image: np.ndarray, demands: Demands) -> Verdict:
    """Check a uint8 RGB (H, W, 3) image against the demands of a prompt (see `parse_prompt`)."""
    return check_detections(detect(image), demands, size=max(image.shape[:2]))


def check_detections(detections: Sequence[Detection], demands: Demands, *, size: int) -> Verdict:
    """Check the objects detected in an image of `size` pixels; this is `check` for many prompts on one image.

    A number demands exactly that many objects, an article at least one; other objects are tolerated.
    """
    met: dict[str, bool] = {}
    for demand, copies in Counter(demands.objects).items():
        # "a circle and a circle" demands two of the kind.
        number = sum(_matches(detection, demand) for detection in detections)
        met[noun_phrase(demand)] = number == demand.count if demand.count > 1 else number >= copies
    if demands.relation is not None:
        first, second = demands.objects
        met[prompt_text(demands)] = any(
            _relation_holds(a, b, demands.relation, size=size)
            for a, b in itertools.permutations(detections, 2)
            if _matches(a, first) and _matches(b, second)
        )
    return Verdict(passed=all(met.values()), demands_met=met)


def _matches(detection: Detection, demand: ObjectDemand) -> bool:
    return detection.shape == demand.shape and demand.colour in (None, detection.colour)


def _relation_holds(first: Detection, second: Detection, relation: Relation, *, size: int) -> bool:
    """The relation of the captions: the larger offset decides, and it must be clear."""
    offset = max(abs(a - b) for a, b in zip(first.centre, second.centre, strict=True))
    return offset >= MIN_OFFSET * size / REFERENCE_SIZE and relation_of(first.centre, second.centre) == relation


def describe(image: np.ndarray) -> str | None:
    """The full caption of a scene from its pixels; None if the image is not such a scene."""
    return caption_of(detect(image))


def caption_of(detections: Sequence[Detection]) -> str | None:
    """The full caption of one to four equal objects or two of different shapes and colours; None for any others."""
    kinds = {(detection.shape, detection.colour) for detection in detections}
    objects = [
        SceneObject(shape, colour, left, top, max(right - left, bottom - top))
        for shape, colour, (left, top, right, bottom), _, _ in detections
    ]
    if len(objects) == 2 and len(kinds) == 2:
        first, second = detections
        if first.shape == second.shape or first.colour == second.colour:
            return None
        if relation_of(first.centre, second.centre) in ("right of", "below"):
            objects.reverse()
    elif len(kinds) != 1 or len(objects) > max(NUMBER_WORDS):
        return None
    return captions(objects)[0]
