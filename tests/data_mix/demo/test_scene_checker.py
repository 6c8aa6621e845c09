"""The scene checker: it agrees with the truth on clean renders and still reads degraded ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from data_mix.demo.scene_checker import Detection, caption_of, check, check_detections, describe, detect
from data_mix.demo.scene_prompts import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Demands,
    ObjectDemand,
    evaluation_prompts,
    parse_prompt,
)
from data_mix.demo.scenes import BACKGROUND, SceneObject, ScenesSource, render

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur_and_noise(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """About 27 dB."""
    blurred = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0))
    return np.clip(np.rint(blurred + generator.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def truth(objects: Sequence[SceneObject], demands: Demands) -> bool:
    """The verdict from the objects of the scene, without the checker's own rules."""

    def fits(o: SceneObject, demand: ObjectDemand) -> bool:
        return o.shape == demand.shape and (demand.colour is None or demand.colour == o.colour)

    def stands(a: SceneObject, b: SceneObject) -> bool:
        x, y = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
        margins = {"left of": x - abs(y), "right of": -x - abs(y), "above": y - abs(x), "below": -y - abs(x)}
        return margins[demands.relation or "above"] >= 0

    for demand in demands.objects:
        number = sum(fits(o, demand) for o in objects)
        if number == 0 or (demand.count > 1 and number != demand.count):
            return False
    if demands.relation is None:
        return True
    first, second = demands.objects
    return any(fits(a, first) and fits(b, second) and stands(a, b) for a in objects for b in objects if a != b)


@pytest.mark.parametrize(
    ("degrade", "num_scenes", "least"), [(lambda image, _: image, 200, 0.99), (blur_and_noise, 120, 0.95)]
)
def test_agrees_with_the_truth(degrade: Degrade, num_scenes: int, least: float) -> None:
    source = ScenesSource(size=32, seed=11, split="val")
    generator = np.random.default_rng(0)
    prompts = evaluation_prompts(per_skill=12, seed=1)
    described = accepted = agreed = 0
    for index in range(num_scenes):
        sample, objects = source[index], source.objects(index)
        detections = detect(degrade(sample.image_HWC, generator))
        described += caption_of(detections) == sample.captions[0]
        accepted += all(check_detections(detections, parse_prompt(text), size=32).passed for text in sample.captions)
        for prompt in prompts:
            verdict = check_detections(detections, prompt.demands, size=32)
            agreed += verdict.passed == truth(objects, prompt.demands)
    assert min(described, accepted, agreed / len(prompts)) / num_scenes >= least


def test_rejects_the_full_demands_with_one_thing_changed() -> None:
    source = ScenesSource(size=32, seed=12)
    rejected: list[bool] = []
    for sample in map(source.__getitem__, range(200)):
        demands = parse_prompt(sample.captions[0])
        first, *rest = demands.objects
        other_colour = COLOURS[(COLOURS.index(first.colour or "red") + 1) % len(COLOURS)]
        other_shape = next(s for s in SHAPES if s not in {demand.shape for demand in demands.objects})
        changes = [replace(first, colour=other_colour), replace(first, shape=other_shape)]
        changes += [replace(first, count=count) for count in (2, 3, 4) if count != first.count]
        wrong = [Demands((change, *rest), demands.relation) for change in changes]
        if rest:
            wrong += [Demands(demands.objects, relation) for relation in RELATIONS if relation != demands.relation]
            wrong.append(Demands((replace(first, colour=rest[0].colour), replace(rest[0], colour=first.colour))))
        detections = detect(sample.image_HWC)
        rejected += [not check_detections(detections, demands, size=32).passed for demands in wrong]
    assert len(rejected) > 700 and np.mean(rejected) >= 0.99


@pytest.mark.parametrize("size", [24, 64, 256])
def test_reads_other_sizes(size: int) -> None:
    source = ScenesSource(size=size, seed=13)
    agreed = sum(describe(source[index].image_HWC) == source[index].captions[0] for index in range(60))
    assert agreed >= 59
    detection = detect(render([SceneObject("square", "green", size // 4, size // 8, size // 2)], size=size))[0]
    box = (size // 4, size // 8, 3 * size // 4, size // 8 + size // 2)
    assert np.abs(np.subtract(detection.box, box)).max() <= size // 32 + 1
    assert (detection.shape, detection.colour) == ("square", "green") and detection.score > 0.9


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_soft_edges_and_touching_objects_are_told_apart(sigma: float) -> None:
    image = render([SceneObject("circle", "red", 6, 6, 18)], size=32).astype(float)
    blurred = np.rint(ndimage.gaussian_filter(image, (sigma, sigma, 0))).astype(np.uint8)
    assert describe(blurred) == "a red circle", "its edge is not a pink object"
    image = render([SceneObject("square", "red", 5, 9, 11), SceneObject("circle", "blue", 16, 9, 11)], size=32)
    assert describe(image) == "a red square left of a blue circle"


def test_specks_blank_and_noise_hold_nothing() -> None:
    blank = np.full((32, 32, 3), BACKGROUND, dtype=np.uint8)
    assert detect(blank) == [] and describe(blank) is None
    specks = blank.copy()
    specks[3:5, 3:6] = (215, 30, 35)
    assert detect(specks) == []
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert describe(noise) is None


def test_a_verdict_names_the_demands_that_are_met() -> None:
    image = render([SceneObject("circle", "red", 2, 10, 11), SceneObject("square", "blue", 18, 10, 11)], size=32)
    verdict = check(image, parse_prompt("a red circle right of a green square"))
    assert not verdict.passed
    expected = {"a red circle": True, "a green square": False, "a red circle right of a green square": False}
    assert verdict.demands_met == expected
    assert check(image, parse_prompt("a blue square right of a red circle")).passed


def test_a_number_is_exact_and_an_article_is_not() -> None:
    image = render([SceneObject("cross", "black", left, 12, 8) for left in (1, 12, 23)], size=32)
    passed = {"three crosses": True, "a cross": True, "a cross and a cross": True, "two crosses": False,
              "four crosses": False}  # fmt: skip
    assert {text: check(image, parse_prompt(text)).passed for text in passed} == passed


def test_other_groups_of_objects_have_no_caption() -> None:
    def detections(*kinds: tuple[str, str]) -> list[Detection]:
        return [Detection(s, c, (9 * i, 2, 9 * i + 8, 10), (9 * i + 4, 6), 1.0) for i, (s, c) in enumerate(kinds)]  # type: ignore[arg-type]

    red = ("circle", "red")
    for others in ([("circle", "blue")], [("square", "red")], [("square", "blue"), ("cross", "green")], [red] * 4):
        assert caption_of(detections(red, *others)) is None
    assert caption_of(detections(*[red] * 4)) == "four red circles"
