"""Image batches: exact shares, the same global batch for any number of ranks, unusable samples counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from data_mix.batches.image_batches import ImageBatches
from data_mix.demo.scenes import ScenesSource
from data_mix.samples import BadSample, Sample
from um3.core.errors import UserError


class PlainImages:
    """Plain images; those with an index in `bad` cannot be used."""

    def __init__(self, name: str, *, length: int = 20, bad: tuple[int, ...] = (), size: int = 4) -> None:
        self.name, self.length, self.bad, self.size = name, length, bad, size
        self.num_read = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.num_read += 1
        if index in self.bad:
            raise BadSample("cannot be decoded", detail=f"index {index}")
        image_HWC = np.full((self.size, self.size, 3), index, dtype=np.uint8)
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


def test_each_source_is_within_one_image_of_its_weight_after_every_step() -> None:
    weights = {"a": 0.7, "b": 0.25, "c": 0.05}
    batches = batches_of(*map(PlainImages, weights), weights=list(weights.values()), seed=1)
    drawn: Counter[str] = Counter()
    for step in range(60):
        drawn.update(batches.batch(step).sources)
        assert all(abs(drawn[name] - weight * 6 * (step + 1)) < 1 for name, weight in weights.items())


def test_without_weights_all_sources_end_their_epochs_together() -> None:
    batches = batches_of(PlainImages("a", length=30), PlainImages("b", length=10), batch_size=8)
    keys = [key for step in range(5) for key in batches.batch(step).keys]
    assert sorted(keys) == sorted([f"a-{i}" for i in range(30)] + [f"b-{i}" for i in range(10)])


def test_any_number_of_ranks_sees_the_same_global_batch() -> None:
    def read(world_size: int, step: int) -> tuple[list[str], list[str], int]:
        sources = [PlainImages("a", bad=(1, 5, 6)), PlainImages("b", length=13)]
        options: dict[str, Any] = {"weights": [2, 1], "batch_size": 12, "world_size": world_size, "caption": "random"}
        parts = [batches_of(*sources, rank=rank, **options).batch(step) for rank in range(world_size)]
        num_skipped = sum(sum(part.skipped.values()) for part in parts)
        return [k for part in parts for k in part.keys], [c for part in parts for c in part.captions], num_skipped

    for step in (0, 3, 11):
        assert read(1, step) == read(2, step) == read(4, step)
    assert read(1, 0) != read(1, 3)


def test_a_rank_reads_only_its_own_samples() -> None:
    source = PlainImages("a")
    batches_of(source, batch_size=8, rank=1, world_size=4).batch(0)
    assert source.num_read == 2


def test_a_resumed_run_gets_the_batches_of_the_uninterrupted_one() -> None:
    runs = [
        batches_of(PlainImages("a", bad=(3,)), PlainImages("b"), weights=[3, 1], caption="random") for _ in range(2)
    ]
    batches = [runs[0].batch(step) for step in range(12)]
    for step in range(7, 12):
        resumed = runs[1].batch(step)
        assert torch.equal(resumed.images_BHWC, batches[step].images_BHWC) and resumed[1:] == batches[step][1:]


def test_random_captions_use_all_of_them() -> None:
    batches = batches_of(PlainImages("a"), batch_size=20, caption="random")
    kinds = Counter(caption.split()[0] for step in range(5) for caption in batches.batch(step).captions)
    assert set(kinds) == {"full", "short"} and min(kinds.values()) > 30


def test_unusable_samples_are_replaced_and_counted_each_time() -> None:
    batches = batches_of(PlainImages("a", length=10, bad=(2, 4)), batch_size=10)
    for step in range(3):
        batch = batches.batch(step)
        assert len(batch.keys) == 10 and set(batch.keys) == {f"a-{i}" for i in range(10) if i not in (2, 4)}
        assert batch.skipped[("a", "cannot be decoded")] >= 2


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no image sources"),
        ([PlainImages("a"), PlainImages("a")], {}, "its own name"),
        ([PlainImages("a")], {"weights": [1, 2]}, "2 weights for 1 image sources"),
        ([PlainImages("a"), PlainImages("b", size=8)], {"weights": [1, 1]}, "different sizes"),
        ([PlainImages("a", length=3, bad=(0, 1, 2))], {}, r"none of the 3 samples .* 'a' .*cannot be decoded \(3\)"),
    ],
)
def test_mistakes_are_one_line(sources: list[PlainImages], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches_of(*sources, **options).batch(0)
