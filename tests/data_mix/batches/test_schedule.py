"""Calm-down against the paper's figures, and the exactness of the counts."""

import pytest

from data_mix.batches.schedule import TASKS, MixConfig, Schedule
from um3.core.config import load_config
from um3.core.errors import UserError


def test_the_papers_rows_per_batch() -> None:
    schedule = Schedule(MixConfig())
    assert schedule.counts(0, batch_size=512) == {"text": 480, "i2t": 8, "t2i": 24}
    for step in (10_000, 10_001, 10_002, 10_003, 10_777):
        assert schedule.counts(step, batch_size=512) == {"text": 384, "i2t": 32, "t2i": 96}


def test_proportion_reading_of_equation_7() -> None:
    schedule = Schedule(MixConfig())
    assert schedule.proportions(0) == {"text": 60 / 64, "i2t": 1 / 64, "t2i": 3 / 64}
    for step in (1, 2_500, 9_999, 10_000, 400_000):
        r0, rT, T = 0.9375, 0.75, 10_000
        expected = (rT - r0) / T * (step - T) + rT if step <= T else rT
        assert schedule.proportions(step)["text"] == pytest.approx(expected, abs=1e-12)
        assert schedule.proportions(step)["t2i"] == pytest.approx(3 * schedule.proportions(step)["i2t"])


def test_weight_reading_of_equation_7() -> None:
    schedule = Schedule(MixConfig(mode="weight"))
    assert schedule.proportions(0)["text"] == pytest.approx(60 / 64)
    assert schedule.proportions(5_000)["text"] == pytest.approx(36 / 40)
    assert schedule.proportions(10_000)["text"] == pytest.approx(12 / 16)


@pytest.mark.parametrize("mode", ["proportion", "weight"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 512])
@pytest.mark.parametrize("end", [[12, 1, 3], [0, 2, 1], [1, 1, 1]])
def test_every_prefix_is_within_one_row(mode: str, batch_size: int, end: list[float]) -> None:
    schedule = Schedule(MixConfig(end=end, calm_down_steps=300, mode=mode))  # type: ignore[arg-type]
    had, asked = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0.0)
    for step in range(500):
        counts = schedule.counts(step, batch_size=batch_size)
        assert sum(counts.values()) == batch_size
        for task in TASKS:
            assert counts[task] >= 0
            had[task] += counts[task]
            asked[task] += schedule.proportions(step)[task] * batch_size
            assert abs(had[task] - asked[task]) < 1 + 1e-6
    assert schedule.counts_before(500, batch_size=batch_size) == had


def test_resume_needs_the_step_only() -> None:
    config = MixConfig(calm_down_steps=200)
    undisturbed = Schedule(config)
    expected = [undisturbed.counts(step, batch_size=10) for step in range(400)]
    for step in (3, 150, 201, 399):
        assert Schedule(config).counts(step, batch_size=10) == expected[step]


def test_no_calm_down_starts_at_the_end_mix() -> None:
    assert Schedule(MixConfig(calm_down_steps=0)).counts(0, batch_size=16) == {"text": 12, "i2t": 1, "t2i": 3}


def test_a_task_of_ratio_zero_gets_no_row() -> None:
    schedule = Schedule(MixConfig(start=[0, 0, 1], end=[0, 0.3, 0.7], calm_down_steps=50))
    assert all(schedule.counts(step, batch_size=7)["text"] == 0 for step in range(100))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start=[60,1]"], "mix.start=.*three ratios"),
        (["end=[0,0,0]"], "mix.end"),
        (["end=[-1,1,1]"], "mix.end"),
        (["calm_down_steps=-5"], "calm_down_steps=-5"),
        (["mode=share"], "mode"),
    ],
)
def test_senseless_mixes_are_one_line_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(MixConfig, overrides=overrides)


def test_config_reads_the_ratios() -> None:
    config = load_config(MixConfig, overrides=["start=[8,1,1]", "mode=weight"])
    assert config.start == [8, 1, 1]
    assert config.mode == "weight"


def test_a_restart_begins_the_calm_down_anew_and_counts_stay_exact() -> None:
    config = MixConfig(start=[60, 1, 3], end=[12, 1, 3], calm_down_steps=40)
    plain, restarted = Schedule(config), Schedule(config)
    before = [restarted.counts(step, batch_size=32) for step in range(50)]
    restarted.restart(50)
    restarted.restart(60)
    whole = Schedule(config, restarts=[50, 60])
    assert before == [plain.counts(step, batch_size=32) for step in range(50)]
    for step in range(150):
        since = step - (60 if step >= 60 else 50 if step >= 50 else 0)
        assert restarted.proportions(step) == plain.proportions(since)
        assert restarted.counts(step, batch_size=32) == whole.counts(step, batch_size=32)
        had, due = (restarted.counts_before(step, batch_size=32), restarted.due(step, batch_size=32))
        assert all(abs(had[task] - due[task]) < 1 for task in TASKS)
