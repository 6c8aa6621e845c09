"""Orders, exact counts and interleaving: the properties that make a batch a function of (seed, step)."""

import random

import pytest

from data_mix.order import SHARE_UNIT, ExactCounts, SampleOrder, fixed_shares, interleave, rank_positions
from um3.core.errors import UserError


def constant_counts(weights: list[float], *, batch_size: int) -> ExactCounts:
    shares = fixed_shares(weights)
    return ExactCounts(lambda step: shares, batch_size=batch_size)


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


def test_substitutes_are_the_rest_of_the_epoch_once_each() -> None:
    order = SampleOrder(6, seed=0, name="a")
    for draw in (0, 4, 11, 13):
        substitutes = list(order.substitutes(draw))
        assert substitutes[0] == order.index(draw) and sorted(substitutes) == list(range(6))
        epoch = [order.index(draw - draw % 6 + position) for position in range(6)]
        assert substitutes == epoch[draw % 6 :] + epoch[: draw % 6]


def test_due_counts_and_draws_agree() -> None:
    counts = constant_counts([0.5, 0.3, 0.2], batch_size=7)
    given = [0, 0, 0]
    for step in range(51):
        assert counts.before(step) == tuple(given)
        assert counts.due(step) == pytest.approx([3.5 * step, 2.1 * step, 1.4 * step])
        assert all(abs(count - due) < 1 for count, due in zip(given, counts.due(step), strict=True))
        for i, number in counts.draws(step):
            assert number == given[i], "every class is drawn in sequence"
            given[i] += 1


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 9])
def test_fixed_shares_stay_within_one_sample_after_every_step(num_classes: int) -> None:
    draw = random.Random(num_classes)
    for batch_size in (1, 2, 7, 64):
        weights = [draw.choice([0.0, 0.01, 1.0, 1.0, 30.0 * draw.random()]) for _ in range(num_classes - 1)] + [1.0]
        counts = constant_counts(weights, batch_size=batch_size)
        for step in range(1, 400):
            given = counts.before(step)
            assert sum(given) == step * batch_size
            assert min(counts.at(step)) >= 0
            for count, weight in zip(given, weights, strict=True):
                assert abs(count - weight / sum(weights) * step * batch_size) < 1 + 1e-6


def test_changing_shares_of_three_classes_stay_within_one_sample() -> None:
    draw = random.Random(0)
    for _ in range(40):
        table = [fixed_shares([draw.random() ** 4, draw.random(), draw.random() ** 2]) for _ in range(150)]
        batch_size = draw.choice([1, 2, 3, 10])
        counts = ExactCounts(table.__getitem__, batch_size=batch_size)
        for step in range(1, 150):
            given = counts.before(step)
            assert sum(given) == step * batch_size
            assert min(counts.at(step - 1)) >= 0
            for i in range(3):
                assert abs(given[i] - sum(shares[i] for shares in table[:step]) * batch_size / SHARE_UNIT) < 1


def test_batches_of_changing_size_keep_to_the_shares() -> None:
    draw = random.Random(5)
    sizes = [draw.choice([0, 0, 1, 3]) for _ in range(300)]
    shares = fixed_shares([0.5, 0.2, 0.2, 0.1])
    counts = ExactCounts(lambda step: shares, batch_size=sizes.__getitem__)
    for step in range(1, 300):
        assert sum(counts.at(step - 1)) == sizes[step - 1]
        for count, share in zip(counts.before(step), shares, strict=True):
            assert abs(count - share / SHARE_UNIT * sum(sizes[:step])) < 1


def test_counts_at_a_step_do_not_depend_on_where_one_starts() -> None:
    walked = constant_counts([0.5, 0.3, 0.2], batch_size=7)
    one_by_one = [walked.at(step) for step in range(100)]
    assert constant_counts([0.5, 0.3, 0.2], batch_size=7).at(57) == one_by_one[57]
    assert len(set(one_by_one)) > 1


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        fixed_shares(weights)


def test_interleave_keeps_the_counts_and_spreads_them() -> None:
    counts = (48, 4, 12)
    classes = interleave(counts)
    assert [classes.count(i) for i in range(3)] == list(counts)
    for world_size in (2, 4):
        for rank in range(world_size):
            positions = rank_positions(64, rank=rank, world_size=world_size)
            for i, count in enumerate(counts):
                assert abs([classes[position] for position in positions].count(i) - count / world_size) <= 1


def test_ranks_partition_the_batch_or_it_is_refused() -> None:
    assert [i for rank in range(3) for i in rank_positions(12, rank=rank, world_size=3)] == list(range(12))
    with pytest.raises(UserError, match="batch_size=10 does not divide among 4"):
        rank_positions(10, rank=0, world_size=4)
