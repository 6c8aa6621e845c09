"""Calm-down against the paper's figures, and the exactness of the counts."""

from typing import Any

import pytest

from data_mix.batches.schedule import TASKS, MixConfig, Schedule


def test_both_readings_of_equation_7() -> None:
    schedule = Schedule(MixConfig())
    assert schedule.proportions(0) == {"text": 60 / 64, "i2t": 1 / 64, "t2i": 3 / 64}
    for step in (1, 2_500, 9_999, 10_000, 400_000):
        r0, rT, T = 0.9375, 0.75, 10_000
        expected = (rT - r0) / T * (step - T) + rT if step <= T else rT
        assert schedule.proportions(step)["text"] == pytest.approx(expected, abs=1e-12)
        assert schedule.proportions(step)["t2i"] == pytest.approx(3 * schedule.proportions(step)["i2t"])
    weights = Schedule(MixConfig(mode="weight"))
    for step, expected in ((0, 60 / 64), (5_000, 36 / 40), (10_000, 12 / 16)):
        assert weights.proportions(step)["text"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["proportion", "weight"])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
@pytest.mark.parametrize("end", [[12, 1, 3], [0, 2, 1], [1, 1, 1]])
def test_counts_are_within_one_sample_after_every_step(mode: Any, batch_size: int, end: list[float]) -> None:
    config = MixConfig(end=end, calm_down_steps=150, mode=mode)
    schedule = Schedule(config)
    given, expected = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0.0)
    for step in range(250):
        counts = schedule.counts(step, batch_size=batch_size)
        assert sum(counts.values()) == batch_size and min(counts.values()) >= 0
        for task in TASKS:
            given[task] += counts[task]
            expected[task] += schedule.proportions(step)[task] * batch_size
            assert abs(given[task] - expected[task]) < 1 + 1e-6
    assert schedule.counts_before(250, batch_size=batch_size) == given
    due = schedule.due_samples({f"{task}/a": 1 for task in TASKS}, batch_size=batch_size, step=250)
    assert due == pytest.approx(expected | {f"{task}/a": count for task, count in given.items()})


def test_no_calm_down_and_ratios_of_zero() -> None:
    assert Schedule(MixConfig(calm_down_steps=0)).counts(0, batch_size=16) == {"text": 12, "i2t": 1, "t2i": 3}
    schedule = Schedule(MixConfig(start=[0, 0, 1], end=[0, 0.3, 0.7], calm_down_steps=50))
    assert all(schedule.counts(step, batch_size=7)["text"] == 0 for step in range(100))
