"""Image batches: exact shares, the same global batch for any number of ranks, unusable samples counted."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from data_mix.batches.image_batches import ImageBatches
from data_mix.demo.scenes import ScenesSource
from data_mix.prefetch import Prefetch
from data_mix.samples import BadSample, Sample
from um3.core.errors import UserError


class DamagedSource:
    """Plain images whose indices in `bad` cannot be used."""

    def __init__(self, name: str, *, length: int, bad: set[int], size: int = 4) -> None:
        self.name, self.length, self.bad, self.size = name, length, bad, size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        if index in self.bad:
            raise BadSample("cannot be decoded", detail=f"index {index}")
        image_HWC = np.full((self.size, self.size, 3), index, dtype=np.uint8)
        return Sample(key=f"{self.name}-{index}", image_HWC=image_HWC, captions=(f"full {index}", f"short {index}"))


def plain(name: str, *, length: int = 20, bad: set[int] | None = None) -> DamagedSource:
    return DamagedSource(name, length=length, bad=bad or set())


def test_batch_of_scenes_has_the_promised_shape() -> None:
    batch = ImageBatches([ScenesSource(size=32, length=50)], batch_size=8, seed=0).batch(0)
    assert batch.images_BHWC.shape == (8, 32, 32, 3)
    assert batch.images_BHWC.dtype == torch.uint8
    assert batch.captions == [captions[0] for captions in batch.all_captions]
    assert len(set(batch.keys)) == 8
    assert batch.sources == ["scenes"] * 8


def test_every_prefix_holds_each_source_within_one_image_of_its_weight() -> None:
    sources = [plain("a"), plain("b"), plain("c")]
    batches = ImageBatches(sources, weights=[0.7, 0.25, 0.05], batch_size=6, seed=1)
    had: Counter[str] = Counter()
    for step in range(60):
        had.update(batches.batch(step).sources)
        for name, weight in zip("abc", (0.7, 0.25, 0.05), strict=True):
            assert abs(had[name] - weight * 6 * (step + 1)) < 1


def test_without_weights_all_sources_end_their_epochs_together() -> None:
    batches = ImageBatches([plain("a", length=30), plain("b", length=10)], batch_size=8, seed=0)
    keys = [key for step in range(5) for key in batches.batch(step).keys]
    assert sorted(keys) == sorted([f"a-{i}" for i in range(30)] + [f"b-{i}" for i in range(10)])


def test_any_number_of_ranks_sees_the_same_global_batch() -> None:
    def read(world_size: int, step: int) -> tuple[list[str], list[str], int]:
        sources = [plain("a", bad={1, 5, 6}), plain("b", length=13)]
        parts = [
            ImageBatches(
                sources, weights=[2, 1], batch_size=12, seed=7, rank=rank, world_size=world_size, caption="random"
            ).batch(step)
            for rank in range(world_size)
        ]
        skipped = sum(sum(part.skipped.values()) for part in parts)
        return [k for part in parts for k in part.keys], [c for part in parts for c in part.captions], skipped

    for step in (0, 3, 11):
        assert read(1, step) == read(2, step) == read(4, step)
    assert read(1, 0) != read(1, 3)


def test_a_rank_reads_only_its_own_rows() -> None:
    source = plain("a")
    ImageBatches([source], batch_size=8, seed=0, rank=1, world_size=4).batch(0)
    assert len(source.read) == 2


def test_a_resumed_run_gets_the_batches_of_the_undisturbed_one() -> None:
    def make() -> ImageBatches:
        return ImageBatches([plain("a", bad={3}), plain("b")], weights=[3, 1], batch_size=5, seed=2, caption="random")

    undisturbed = make()
    batches = [undisturbed.batch(step) for step in range(12)]
    resumed = make()
    for step in range(7, 12):
        again = resumed.batch(step)
        assert torch.equal(again.images_BHWC, batches[step].images_BHWC)
        assert again[1:] == batches[step][1:]


def test_random_captions_use_all_of_them() -> None:
    batches = ImageBatches([plain("a")], batch_size=20, seed=0, caption="random")
    kinds = Counter(caption.split()[0] for step in range(5) for caption in batches.batch(step).captions)
    assert set(kinds) == {"full", "short"}
    assert min(kinds.values()) > 30


def test_unusable_samples_are_replaced_and_counted_each_time() -> None:
    batches = ImageBatches([plain("a", length=10, bad={2, 4})], batch_size=10, seed=0)
    for step in range(3):
        batch = batches.batch(step)
        assert len(batch.keys) == 10
        assert not {"a-2", "a-4"} & set(batch.keys)
        assert set(batch.keys) == {f"a-{i}" for i in range(10) if i not in (2, 4)}
        assert batch.skipped[("a", "cannot be decoded")] >= 2


def test_a_source_with_nothing_usable_stops_with_its_name_and_reason() -> None:
    batches = ImageBatches([plain("a", length=3, bad={0, 1, 2})], batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"none of the 3 samples of image source 'a' .*cannot be decoded \(3\)"):
        batches.batch(0)


def test_mistakes_in_the_config_are_one_line() -> None:
    with pytest.raises(UserError, match="no image sources"):
        ImageBatches([], batch_size=2, seed=0)
    with pytest.raises(UserError, match="a name of its own"):
        ImageBatches([plain("a"), plain("a")], batch_size=2, seed=0)
    with pytest.raises(UserError, match="2 weights for 1 image sources"):
        ImageBatches([plain("a")], weights=[1, 2], batch_size=2, seed=0)
    mixed = [plain("a"), DamagedSource("b", length=5, bad=set(), size=8)]
    with pytest.raises(UserError, match="different sizes"):
        ImageBatches(mixed, weights=[1, 1], batch_size=4, seed=0).batch(0)


class Squares:
    """Batches that are numbers; records which thread made them."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.fails_at, self.made, self.threads = fails_at, [], set()  # type: tuple[int, list[int], set[str]]

    def batch(self, step: int) -> int:
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise UserError(f"step {step} cannot be read")
        return step * step


def test_prefetch_gives_the_same_batches_and_works_one_ahead() -> None:
    squares = Squares()
    with Prefetch(squares, num_steps=5) as batches:
        assert [batches.batch(step) for step in range(5)] == [0, 1, 4, 9, 16]
        assert squares.made == [0, 1, 2, 3, 4]
        assert batches.batch(2) == 4
    assert all(name.startswith("prefetch") for name in squares.threads)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetch_has_the_next_batch_ready() -> None:
    squares = Squares()
    with Prefetch(squares) as batches:
        batches.batch(0)
        deadline = time.monotonic() + 5
        while squares.made != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert squares.made == [0, 1]


def test_prefetch_raises_an_error_at_the_step_it_belongs_to() -> None:
    with Prefetch(Squares(fails_at=2)) as batches:
        assert batches.batch(0) == 0
        assert batches.batch(1) == 1
        with pytest.raises(UserError, match="step 2"):
            batches.batch(2)
        assert batches.batch(3) == 9
