"""The picture of the data mix: drawn, with the dots where the borders are."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_mix.preview import draw_mix
from data_mix.schedule import MixConfig, Schedule


def test_scheduled_and_realised_mix_are_drawn(tmp_path: Path) -> None:
    schedule = Schedule(MixConfig(calm_down_steps=60))
    rows: list[dict[str, float]] = [{"step": step, "train/loss": 1.0} for step in range(3)]
    for step in range(100):
        counts = schedule.counts(step, batch_size=64)
        rows.append({"step": step, **{f"data/rows_{task}": count for task, count in counts.items()}})
    draw_mix(schedule, batch_size=64, steps=100, path=tmp_path / "planned.png")
    draw_mix(schedule, batch_size=64, steps=100, realised=rows, path=tmp_path / "realised.png")
    for row in rows[3:]:
        row["data/rows_text"], row["data/rows_t2i"] = row["data/rows_t2i"], row["data/rows_text"]
    draw_mix(schedule, batch_size=64, steps=100, realised=rows, path=tmp_path / "wrong.png")
    planned, realised, wrong = (
        np.asarray(Image.open(tmp_path / name)) for name in ("planned.png", "realised.png", "wrong.png")
    )
    assert planned.shape == realised.shape == (504, 960, 4)
    # The dots of a run that kept to the schedule lie where the planned ones do; only the legend differs.
    assert np.array_equal(planned[:250], realised[:250])
    assert not np.array_equal(planned[:250], wrong[:250])


def test_a_run_without_counts_and_one_step_are_no_trouble(tmp_path: Path) -> None:
    schedule = Schedule(MixConfig(start=[1, 0, 0], end=[1, 0, 0], calm_down_steps=0))
    draw_mix(schedule, batch_size=4, steps=1, path=tmp_path / "one.png")
    draw_mix(schedule, batch_size=4, steps=5, realised=[{"step": 1}], path=tmp_path / "none.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert (tmp_path / "none.png").stat().st_size > 1000
