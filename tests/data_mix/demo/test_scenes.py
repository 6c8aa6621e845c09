"""Scenes: a function of (seed, split, index), drawn within their bounds, with captions that are true."""

from collections import Counter

import numpy as np
import pytest

from data_mix.demo.scene_prompts import (
    SHAPES,
    SKILLS,
    Demands,
    ObjectDemand,
    Shape,
    evaluation_prompts,
    parse_prompt,
    prompt_text,
)
from data_mix.demo.scenes import BACKGROUND, PALETTE, SceneObject, ScenesSource, captions, render, shape_mask

NUM_SCENES = 500


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    source, longer = ScenesSource(size=32, length=10, seed=3), ScenesSource(size=32, length=99, seed=3)
    for index in reversed(range(10)):
        assert source[index].key == longer[index].key and source[index].captions == longer[index].captions
        np.testing.assert_array_equal(source[index].image_HWC, longer[index].image_HWC)
    assert source[0].image_HWC.shape == (32, 32, 3) and source[0].image_HWC.dtype == np.uint8
    other = ScenesSource(size=32, length=10, seed=4)
    assert any(other.objects(index) != source.objects(index) for index in range(10))


def test_the_first_scenes_of_seed_0_have_not_changed() -> None:
    """Golden: after a change here, numbers measured on scenes before cannot be compared."""
    source = ScenesSource(size=32, seed=0)
    assert [source[index].captions[0] for index in range(4)] == [
        "a pink square above a green cross",
        "a black cross above a green triangle",
        "a pink circle above an orange triangle",
        "a green square above a black triangle",
    ]


def test_no_val_scene_is_a_train_scene_of_any_seed() -> None:
    train = {frozenset(ScenesSource(size=32, seed=seed).objects(i)) for seed in (0, 1, 2) for i in range(NUM_SCENES)}
    val = {frozenset(ScenesSource(size=32, seed=0, split="val").objects(i)) for i in range(NUM_SCENES)}
    assert not train & val


@pytest.mark.parametrize("size", [24, 32, 64])
def test_objects_stay_inside_and_apart(size: int) -> None:
    source, gap = ScenesSource(size=size, seed=1), max(1, round(2 * size / 32))
    for objects in map(source.objects, range(NUM_SCENES)):
        for position, a in enumerate(objects):
            assert a.left >= 1 and a.top >= 1 and a.left + a.side < size and a.top + a.side < size
            for b in objects[:position]:
                gap_x = max(a.left - b.left - b.side, b.left - a.left - a.side)
                gap_y = max(a.top - b.top - b.side, b.top - a.top - a.side)
                assert max(gap_x, gap_y) >= gap


def test_families_have_their_shares_and_pairs_are_clear() -> None:
    source = ScenesSource(size=32, seed=2)
    families, counts = Counter[str](), Counter[int]()
    for objects in map(source.objects, range(4000)):
        sides = {o.side for o in objects}
        if len(objects) == 1:
            families["single"] += 1
            assert min(sides) >= 12 and max(sides) <= 18
        elif len({(o.shape, o.colour) for o in objects}) == 1:
            families["count"] += 1
            counts[len(objects)] += 1
            assert min(sides) >= 8 and max(sides) <= 10
        else:
            families["pair"] += 1
            first, second = objects
            assert first.shape != second.shape and first.colour != second.colour
            offsets = np.subtract(second.centre, first.centre)
            assert abs(abs(offsets[0]) - abs(offsets[1])) >= 4
            assert offsets.max() == np.abs(offsets).max(), "reading order"
    shares = {family: count / 4000 for family, count in families.items()}
    assert shares == pytest.approx({"single": 0.20, "count": 0.25, "pair": 0.55}, abs=0.03)
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 250


def test_captions() -> None:
    pair = (SceneObject("circle", "red", 2, 5, 10), SceneObject("square", "orange", 18, 8, 12))
    assert captions(pair) == (
        "a red circle left of an orange square",
        "an orange square right of a red circle",
        "a circle left of a square",
        "a square right of a circle",
        "a red circle and an orange square",
        "a circle and a square",
    )
    assert captions(pair[:1]) == ("a red circle", "a circle")
    crosses = [SceneObject("cross", "blue", left, 3, 8) for left in (1, 12, 22)]
    assert captions(crosses) == ("three blue crosses", "three crosses")


def test_pixels_are_background_ink_and_a_soft_edge() -> None:
    image_HWC = render([SceneObject("circle", "blue", 10, 4, 13)], size=32)
    assert tuple(image_HWC[0, 0]) == BACKGROUND and tuple(image_HWC[4 + 6, 10 + 6]) == PALETTE["blue"]
    assert len({tuple(pixel) for pixel in image_HWC.reshape(-1, 3)}) > 4, "edges are anti-aliased"
    assert (image_HWC[:, :10] == BACKGROUND).all() and (image_HWC[:, 23:] == BACKGROUND).all()
    points = np.array([*PALETTE.values(), BACKGROUND], dtype=float)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(points))
    assert distances.min() > 85 and len(PALETTE) == 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [8, 9, 13, 36])
def test_a_shape_fills_its_box_and_is_symmetric(shape: Shape, side: int) -> None:
    mask_SS = shape_mask(shape, side)
    assert mask_SS.shape == (side, side) and mask_SS.min() >= 0 and mask_SS.max() == 1
    np.testing.assert_array_equal(mask_SS, mask_SS[:, ::-1])
    assert all(edge.max() > 0 for edge in (mask_SS[0], mask_SS[-1], mask_SS[:, 0], mask_SS[:, -1]))


def test_prompts_are_parsed() -> None:
    source = ScenesSource(size=32, seed=5)
    for caption in (caption for index in range(300) for caption in source[index].captions):
        assert prompt_text(parse_prompt(caption)) == caption
    demands = Demands((ObjectDemand("cross", "orange"), ObjectDemand("circle")), "below")
    assert parse_prompt("An orange  cross below a circle.") == demands
    assert parse_prompt("three crosses") == Demands((ObjectDemand("cross", count=3),))


FOREIGN = ["", "a dog", "three circle", "a circles", "a circle left of", "a circle and a square and a cross",
           "a mauve circle", "five circles", "a photo of a circle"]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_is_not_parsed(text: str) -> None:
    with pytest.raises(ValueError, match=r"scene prompt|more than two"):
        parse_prompt(text)


def test_evaluation_prompts_cover_six_skills() -> None:
    prompts = evaluation_prompts(per_skill=12, seed=0)
    assert [prompt.skill for prompt in prompts[::12]] == list(SKILLS)
    assert Counter(prompt.skill for prompt in prompts) == dict.fromkeys(SKILLS, 12)
    assert all(parse_prompt(prompt.prompt) == prompt.demands for prompt in prompts)
    for skill in SKILLS:
        num_different = len({prompt.prompt for prompt in prompts if prompt.skill == skill})
        assert num_different == (len(SHAPES) if skill == "single_object" else 12)
    assert prompts == evaluation_prompts(per_skill=12, seed=0) != evaluation_prompts(per_skill=12, seed=1)


def test_wrong_arguments() -> None:
    for options in ({"size": 8}, {"length": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            ScenesSource(**options)
    with pytest.raises(ValueError, match="per_skill=0"):
        evaluation_prompts(per_skill=0, seed=0)
    with pytest.raises(IndexError):
        ScenesSource(length=3)[3]
