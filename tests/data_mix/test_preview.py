"""The picture of the data mix: drawn, with the dots where the borders are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_mix.preview import draw_mix, main
from data_mix.schedule import MixConfig, Schedule
from um3.core.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


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


def test_the_shipped_configs_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config in sorted(CONFIGS.glob("*/um3.yaml")):
        main(["--config", str(config), "--out", str(tmp_path / "mix.png"), "loop.total_steps=50"])
        assert Image.open(tmp_path / "mix.png").size == (960, 504)
        assert "mix.png: the mix of 50 steps of" in capsys.readouterr().out


def test_a_config_without_a_length_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "um3.yaml").write_text("loop: {batch_size: 8}\n")
    with pytest.raises(UserError, match=r"sets no loop\.total_steps; add it"):
        main(["--config", str(tmp_path / "um3.yaml"), "--out", str(tmp_path / "mix.png")])
