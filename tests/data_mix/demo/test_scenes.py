"""Scenes: a function of (seed, split, index), drawn within their bounds, with captions that are true."""

from collections import Counter

import numpy as np
import pytest

from data_mix.demo.scene_prompts import COLOURS, SHAPES, SKILLS, Demands, ObjectDemand, Shape, prompt_text
from data_mix.demo.scenes import (
    BACKGROUND,
    PALETTE,
    SceneObject,
    ScenesSource,
    captions,
    evaluation_prompts,
    parse_prompt,
    render,
    shape_mask,
)
from data_mix.samples import ImageSource

NUM_SCENES = 1000


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    source = ScenesSource(size=32, length=10, seed=3)
    assert isinstance(source, ImageSource)
    last_first = [source[index] for index in reversed(range(10))][::-1]
    for index, sample in enumerate(last_first):
        again = ScenesSource(size=32, length=99, seed=3)[index]
        assert sample.key == again.key and sample.captions == again.captions
        np.testing.assert_array_equal(sample.image_HWC, again.image_HWC)
    assert source[0].image_HWC.shape == (32, 32, 3) and source[0].image_HWC.dtype == np.uint8
    other = ScenesSource(size=32, length=10, seed=4)
    assert any(other.objects(index) != source.objects(index) for index in range(10))


def test_the_first_scenes_of_seed_0_have_not_changed() -> None:
    # Golden: a change here means that every number measured on scenes before is void.
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
    source = ScenesSource(size=size, seed=1)
    gap = max(1, round(2 * size / 32))
    for index in range(NUM_SCENES):
        objects = source.objects(index)
        for position, a in enumerate(objects):
            assert a.left >= 1 and a.top >= 1 and a.left + a.side < size and a.top + a.side < size
            for b in objects[:position]:
                gap_x = max(a.left - b.left - b.side, b.left - a.left - a.side)
                gap_y = max(a.top - b.top - b.side, b.top - a.top - a.side)
                assert max(gap_x, gap_y) >= gap


def test_families_have_their_shares_and_pairs_are_clear() -> None:
    source = ScenesSource(size=32, seed=2)
    families: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    for index in range(4000):
        objects = source.objects(index)
        kinds = {(o.shape, o.colour) for o in objects}
        if len(objects) == 1:
            families["single"] += 1
            assert 12 <= objects[0].side <= 18
        elif len(kinds) == 1:
            families["count"] += 1
            counts[len(objects)] += 1
            assert all(8 <= o.side <= 10 for o in objects)
        else:
            families["pair"] += 1
            first, second = objects
            assert first.shape != second.shape and first.colour != second.colour
            offset_x = second.centre[0] - first.centre[0]
            offset_y = second.centre[1] - first.centre[1]
            assert abs(abs(offset_x) - abs(offset_y)) >= 4
            assert max(offset_x, offset_y) == max(abs(offset_x), abs(offset_y))  # reading order
    assert families["single"] / 4000 == pytest.approx(0.20, abs=0.03)
    assert families["count"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert families["pair"] / 4000 == pytest.approx(0.55, abs=0.03)
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 250


def test_captions_of_a_pair_tell_a_relation_from_both_sides_and_keep_the_reading_order() -> None:
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


def test_pixels_are_ground_ink_and_a_soft_edge() -> None:
    image_HWC = render([SceneObject("circle", "blue", 10, 4, 13)], size=32)
    assert tuple(image_HWC[0, 0]) == BACKGROUND
    assert tuple(image_HWC[4 + 6, 10 + 6]) == PALETTE["blue"]
    colours = {tuple(pixel) for pixel in image_HWC.reshape(-1, 3)}
    assert len(colours) > 4, "edges are anti-aliased"
    assert (image_HWC[:, :10] == BACKGROUND).all() and (image_HWC[:, 23:] == BACKGROUND).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [8, 9, 13, 18, 36])
def test_a_shape_fills_its_box_and_is_symmetric(shape: Shape, side: int) -> None:
    mask_SS = shape_mask(shape, side)
    assert mask_SS.shape == (side, side) and mask_SS.min() >= 0 and mask_SS.max() == 1
    np.testing.assert_array_equal(mask_SS, mask_SS[:, ::-1])
    for edge in (mask_SS[0], mask_SS[-1], mask_SS[:, 0], mask_SS[:, -1]):
        assert edge.max() > 0


def test_colours_are_well_apart() -> None:
    points = np.array([*PALETTE.values(), BACKGROUND], dtype=float)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(points))
    assert distance.min() > 85


def test_every_caption_parses_back() -> None:
    source = ScenesSource(size=32, seed=5)
    for index in range(300):
        for caption in source[index].captions:
            assert prompt_text(parse_prompt(caption)) == caption


def test_parse_prompt_gives_the_demands() -> None:
    assert parse_prompt("An orange  cross below a circle.") == Demands(
        (ObjectDemand("cross", "orange"), ObjectDemand("circle")), "below"
    )
    assert parse_prompt("three crosses") == Demands((ObjectDemand("cross", count=3),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "three circle",
        "a circles",
        "a circle left of",
        "a circle and a square and a cross",
        "a mauve circle",
        "five circles",
        "a photo of a circle",
    ],
)
def test_parse_prompt_refuses_foreign_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"scene prompt|more than two"):
        parse_prompt(text)


def test_evaluation_prompts_cover_six_skills() -> None:
    prompts = evaluation_prompts(per_skill=12, seed=0)
    assert [prompt.skill for prompt in prompts[::12]] == list(SKILLS)
    assert Counter(prompt.skill for prompt in prompts) == dict.fromkeys(SKILLS, 12)
    assert all(parse_prompt(prompt.prompt) == prompt.demands for prompt in prompts)
    for skill in ("counting", "colors", "position", "color_attr", "two_object"):
        assert len({prompt.prompt for prompt in prompts if prompt.skill == skill}) == 12
    assert len({prompt.prompt for prompt in prompts if prompt.skill == "single_object"}) == len(SHAPES)
    assert prompts == evaluation_prompts(per_skill=12, seed=0) != evaluation_prompts(per_skill=12, seed=1)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size=8"):
        ScenesSource(size=8)
    with pytest.raises(ValueError, match="length=0"):
        ScenesSource(length=0)
    with pytest.raises(ValueError, match="split='test'"):
        ScenesSource(split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_skill=0"):
        evaluation_prompts(per_skill=0, seed=0)
    with pytest.raises(IndexError):
        ScenesSource(length=3)[3]
    assert len(COLOURS) == 8
