"""Orders, exact counts and interleaving: the properties that make a batch a function of (seed, step)."""

import random
from fractions import Fraction

import pytest

from data_mix.order import SHARE_UNIT, ExactCounts, SampleOrder, fixed_shares, interleave
from um3.core.errors import UserError


def test_each_epoch_reads_every_sample_once_in_its_own_order() -> None:
    order = SampleOrder(50, seed=3, name="scenes")
    epochs = [[order.index(draw) for draw in range(50 * epoch, 50 * (epoch + 1))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    with pytest.raises(UserError, match="'digits' is empty"):
        SampleOrder(0, seed=0, name="digits")


def test_order_depends_on_seed_and_name_only() -> None:
    def read(seed: int, name: str) -> list[int]:
        order = SampleOrder(100, seed=seed, name=name)
        return [order.index(draw) for draw in reversed(range(250))]

    assert read(1, "a") == read(1, "a")
    assert read(1, "a") != read(2, "a")
    assert read(1, "a") != read(1, "b")


def test_an_order_is_the_one_that_older_runs_began_with() -> None:
    order = SampleOrder(12, seed=3, name="scenes")
    assert [order.index(draw) for draw in range(12, 24)] == [0, 2, 11, 4, 6, 5, 7, 8, 1, 10, 9, 3]


def test_substitutes_are_the_rest_of_the_epoch_once_each() -> None:
    order = SampleOrder(6, seed=0, name="a")
    for draw in (0, 4, 11, 13):
        epoch = [order.index(draw - draw % 6 + position) for position in range(6)]
        assert list(order.substitutes(draw)) == epoch[draw % 6 :] + epoch[: draw % 6]
        assert sorted(epoch) == list(range(6)) and epoch[draw % 6] == order.index(draw)


def check_counts(shares: list[tuple[int, ...]], sizes: list[int]) -> None:
    """The counts of batches of these sizes are whole, exact in sum, and within one sample of their shares."""
    counts = ExactCounts(shares.__getitem__, batch_size=sizes.__getitem__)
    given, due = [0] * len(shares[0]), [0.0] * len(shares[0])
    for step, size in enumerate(sizes):
        assert counts.before(step) == tuple(given) and counts.due(step) == pytest.approx(due)
        at = counts.at(step)
        assert sum(at) == size and min(at) >= 0
        drawn = counts.draws(step)
        assert counts.draws(step, range(size // 3)) + counts.draws(step, range(size // 3, size)) == drawn
        for i, share in enumerate(shares[step]):
            assert [number for j, number in drawn if j == i] == list(range(given[i], given[i] + at[i])), "in sequence"
            given[i] += at[i]
            due[i] += share * size / SHARE_UNIT
            assert abs(given[i] - due[i]) < 1 + 1e-6
    middle = len(sizes) // 2
    fresh = ExactCounts(shares.__getitem__, batch_size=sizes.__getitem__)
    assert fresh.at(middle) == counts.at(middle), "they do not depend on where one starts"


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 9])
def test_fixed_shares_stay_within_one_sample_after_every_step(num_classes: int) -> None:
    draw = random.Random(num_classes)
    for sizes in ([1], [2], [7], [64], [0, 0, 1, 3]):
        weights = [draw.choice([0.0, 0.01, 1.0, 1.0, 30.0 * draw.random()]) for _ in range(num_classes - 1)] + [1.0]
        check_counts([fixed_shares(weights)] * 400, [draw.choice(sizes) for _ in range(300)])


def test_changing_shares_of_three_classes_stay_within_one_sample() -> None:
    draw = random.Random(0)
    for _ in range(40):
        shares = [fixed_shares([draw.random() ** 4, draw.random(), draw.random() ** 2]) for _ in range(150)]
        check_counts(shares, [draw.choice([1, 2, 3, 10])] * 149)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        fixed_shares(weights)


@pytest.mark.parametrize("counts", [(), (0, 0), (5,), (3, 0, 3), (7, 11, 1), (1000, 999, 333, 2)])
def test_interleave_sorts_by_place_then_class(counts: tuple[int, ...]) -> None:
    places = [(Fraction(2 * j + 1, count), i) for i, count in enumerate(counts) for j in range(count)]
    assert interleave(counts).tolist() == [i for _, i in sorted(places)]
