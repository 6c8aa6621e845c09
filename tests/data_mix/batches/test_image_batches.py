"""Image batches: exact shares, the same global batch for any number of ranks, unusable samples counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from data_mix.batches.config import AugmentConfig
from data_mix.batches.image_batches import ImageBatches, augmented, drop_words
from data_mix.demo.scenes import ScenesSource
from data_mix.samples import BadSample, Sample
from um3.core.errors import UserError


class PlainImages:
    """Plain images; those with an index in `bad` cannot be used."""

    def __init__(self, name: str, *, length: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.name, self.length, self.bad = name, length, bad
        self.fingerprint = lambda: f"{name} {length}"
        self.num_read = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.num_read += 1
        if index in self.bad:
            raise BadSample("cannot be decoded", detail=f"index {index}")
        image_HWC = np.full((4, 4, 3), index, dtype=np.uint8)
        return Sample(f"{self.name}-{index}", image_HWC, captions=(f"full {index}", f"short {index}"))


def batches_of(*sources: Any, batch_size: int = 6, seed: int = 0, **options: Any) -> ImageBatches:
    return ImageBatches(sources, batch_size=batch_size, seed=seed, **options)


def test_shapes_and_first_captions() -> None:
    scenes = ScenesSource(size=32, length=50)
    batch = batches_of(scenes, batch_size=8).batch(0)
    assert (batch.images_BHWC.shape, batch.images_BHWC.dtype) == ((8, 32, 32, 3), torch.uint8)
    samples = {sample.key: sample for sample in (scenes[index] for index in range(50))}
    assert len(set(batch.keys)) == 8 and batch.sources == ["scenes"] * 8
    assert batch.captions == [samples[key].captions[0] for key in batch.keys]
    for image_HWC, key in zip(batch.images_BHWC, batch.keys, strict=True):
        assert np.array_equal(image_HWC.numpy(), samples[key].image_HWC)


def test_without_weights_all_sources_end_their_epochs_together() -> None:
    batches = batches_of(PlainImages("a", length=30), PlainImages("b", length=10), batch_size=8)
    keys = [key for step in range(5) for key in batches.batch(step).keys]
    assert sorted(keys) == sorted([f"a-{i}" for i in range(30)] + [f"b-{i}" for i in range(10)])


def test_the_line_says_how_often_an_image_is_read() -> None:
    batches = batches_of(PlainImages("a", length=32), PlainImages("b", length=4), weights=[1, 1], batch_size=16)
    a = "a: 32 images, each read 2.0 times"
    b = "b: 4 images, each read 16.0 times and 2.0 times a batch; a smaller batch is enough"
    assert batches.describe(num_steps=8) == f"{a}; {b}"
    counts = Counter(key for step in range(8) for key in batches.batch(step).keys)
    assert {counts[f"a-{i}"] for i in range(32)} == {2} and {counts[f"b-{i}"] for i in range(4)} == {16}


def test_any_number_of_ranks_and_a_resumed_run_see_the_same_global_batch() -> None:
    def opened(rank: int = 0, world_size: int = 1) -> ImageBatches:
        sources = [PlainImages("a", bad=(1, 5, 6)), PlainImages("b", length=13)]
        options: dict[str, Any] = {"weights": [2, 1], "batch_size": 12, "caption": "random"}
        return batches_of(*sources, rank=rank, world_size=world_size, **options)

    part = opened(rank=3, world_size=4)
    part.batch(0)
    assert 3 <= sum(source.num_read for source in part.sources) < 6, "a rank reads only its own samples"
    uninterrupted = opened()
    batches = [uninterrupted.batch(step) for step in range(12)]
    assert batches[0].keys != batches[3].keys
    assert all(Counter(batch.sources) == {"a": 8, "b": 4} for batch in batches), "by their weights"
    kinds = Counter(caption.split()[0] for batch in batches for caption in batch.captions)
    assert set(kinds) == {"full", "short"} and min(kinds.values()) > 45
    for step in (0, 3, 11):
        for world_size in (1, 2, 4):
            parts = [opened(rank, world_size).batch(step) for rank in range(world_size)]
            assert torch.equal(torch.cat([part.images_BHWC for part in parts]), batches[step].images_BHWC)
            for name in ("keys", "captions", "sources"):
                assert [value for part in parts for value in getattr(part, name)] == getattr(batches[step], name)
            assert sum((Counter(part.skipped) for part in parts), Counter()) == batches[step].skipped


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(flip=True), AugmentConfig(shift=3), AugmentConfig(zoom=0.5), AugmentConfig(True, 3, 0.3, 0.3, 0.3)],
)
def test_augmented_images_depend_on_seed_step_and_place_alone(augment: AugmentConfig) -> None:
    scenes, plain = ScenesSource(size=32, length=50), batches_of(ScenesSource(size=32, length=50), batch_size=8)
    whole, other = (batches_of(scenes, batch_size=8, seed=seed, augment=augment) for seed in (0, 1))
    ranks = [batches_of(scenes, batch_size=8, rank=rank, world_size=2, augment=augment) for rank in range(2)]
    parts = torch.cat([batches.batch(3).images_BHWC for batches in ranks])
    changed = whole.batch(3).images_BHWC
    assert torch.equal(parts, changed) and torch.equal(whole.batch(3).images_BHWC, changed)
    captions = [caption for batches in ranks for caption in batches.batch(3).captions]
    assert captions == whole.batch(3).captions
    assert (captions == plain.batch(3).captions) is not bool(augment.drop_words)
    assert whole.batch(3).keys == plain.batch(3).keys and not torch.equal(changed, plain.batch(3).images_BHWC)
    assert not torch.equal(other.batch(3).images_BHWC, changed)


def test_an_image_is_moved_with_its_edge_repeated_and_mirrored_unless_its_caption_names_a_side() -> None:
    image_HWC = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)

    def seen(caption: str, **settings: Any) -> set[bytes]:
        augment = AugmentConfig(**settings)
        images = [augmented(image_HWC, augment, caption=caption, seed=seed) for seed in range(200)]
        assert {image.shape for image in images} == {image_HWC.shape}
        return {image.tobytes() for image in images}

    plain, mirrored = image_HWC.tobytes(), image_HWC[:, ::-1].tobytes()
    assert seen("a copyright sign", flip=True) == {plain, mirrored}
    assert seen("Leftwards arrow", flip=True) == seen("the right hand", flip=True) == {plain}
    moved = seen("any", shift=1)
    assert len(moved) == 9 and plain in moved
    up_and_left = np.pad(image_HWC[1:, 1:], ((0, 1), (0, 1), (0, 0)), mode="edge")
    assert up_and_left.tobytes() in moved
    assert len(seen("any", shift=1, flip=True)) == 18


def test_zoom_shows_a_part_larger_and_colour_keeps_the_place_of_everything() -> None:
    image_HWC = np.zeros((16, 16, 3), np.uint8)
    image_HWC[:8, :8] = (200, 60, 60)

    def seen(**settings: float) -> list[np.ndarray]:
        changed = AugmentConfig(**settings)
        return [augmented(image_HWC, changed, caption="", seed=seed) for seed in range(200)]

    assert all(np.array_equal(image, image_HWC) for image in seen(zoom=0.0))
    lit = [int((image[..., 0] > 100).sum()) for image in seen(zoom=0.5)]
    assert {image.shape for image in seen(zoom=0.5)} == {(16, 16, 3)}
    assert min(lit) >= 0 and max(lit) > 150 and 64 * 0.7 < np.mean(lit) < 64 * 1.3  # of 64; half the side shows 256
    coloured = seen(colour=0.3)
    assert len({image.tobytes() for image in coloured}) > 100
    for image in coloured:
        assert (image[:8, :8] == image[0, 0]).all() and (image[8:] == image[15, 15]).all()
        assert image[0, 0, 0] > image[0, 0, 1] and abs(int(image[0, 0, 0]) - 200) < 150


def test_fingerprints_name_the_samples_of_every_source() -> None:
    assert batches_of(PlainImages("a"), PlainImages("b")).fingerprints() == {"images/a": "a 20", "images/b": "b 20"}


def test_unusable_samples_are_replaced_and_counted_each_time() -> None:
    batches = batches_of(PlainImages("a", length=10, bad=(2, 4)), batch_size=10)
    for step in range(3):
        batch = batches.batch(step)
        assert len(batch.keys) == 10 and set(batch.keys) == {f"a-{i}" for i in range(10) if i not in (2, 4)}
        assert batch.skipped[("a", "cannot be decoded")] >= 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no image sources"),
        ([PlainImages("a"), PlainImages("a")], "its own name"),
        ([PlainImages("a", length=3, bad=(0, 1, 2))], r"none of the 3 samples .* 'a' .*cannot be decoded \(3\)"),
    ],
)
def test_mistakes_are_one_line(sources: list[PlainImages], message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches_of(*sources).batch(0)


def test_words_of_a_caption_are_dropped_at_their_rate_in_order_and_never_all() -> None:
    caption, length = "a red circle left of two small blue squares", 9
    seen = [drop_words(caption, share=0.3, seed=seed).split() for seed in range(1000)]
    for words in seen:
        left = iter(caption.split())
        assert words and all(word in left for word in words)  # in the order of the caption
    assert sum(map(len, seen)) / 1000 == pytest.approx(0.7 * length, abs=0.2)
    assert {drop_words(caption, share=0.0, seed=seed) for seed in range(9)} == {caption}
    assert {drop_words("circle", share=0.9, seed=seed) for seed in range(99)} == {"circle"}
    assert drop_words("", share=0.5, seed=0) == ""
