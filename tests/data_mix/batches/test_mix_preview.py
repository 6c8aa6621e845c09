"""The picture of the data mix: drawn, with the dots where the borders are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_mix.batches.config import DataConfig
from data_mix.batches.mix_preview import draw_mix, due_samples, main, source_shares
from data_mix.batches.schedule import TASKS, MixConfig, Schedule, Task
from data_mix.codes.shards import ShardHeader, shard_path, write_shard
from data_mix.order import ExactCounts, fixed_shares
from data_mix.sources.text import TextSourceConfig
from um3.core.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


SHARES = {"text/prose": 0.75, "text/notes": 0.25, "i2t/photo": 1.0, "t2i/photo": 1.0}


def run_of(schedule: Schedule, *, steps: int, swapped: bool = False) -> list[dict[str, float]]:
    """metrics.jsonl of a run that kept to the schedule, or gave one source what was another's."""
    rows: list[dict[str, float]] = [{"step": step, "train/loss": 1.0} for step in range(3)]
    counts = {task: task_counts(schedule, task) for task in TASKS}
    for step in range(1, steps + 1):
        due = due_samples(schedule, SHARES, batch_size=64, step=step)
        had = {"text/prose": counts["text"].before(step)[0], "text/notes": counts["text"].before(step)[1]}
        had |= {f"{task}/photo": counts[task].before(step)[0] for task in TASKS[1:]}
        if swapped:
            had["text/prose"], had["text/notes"] = had["text/notes"], had["text/prose"]
        had |= {task: schedule.counts_before(step, batch_size=64)[task] for task in TASKS}
        row: dict[str, float] = {"step": step}
        row |= {f"data/samples/{key}": count for key, count in had.items()}
        rows.append(row | {f"data/scheduled/{key}": count for key, count in due.items()})
    return rows


def task_counts(schedule: Schedule, task: Task) -> ExactCounts:
    shares = fixed_shares([share for key, share in SHARES.items() if key.startswith(f"{task}/")])
    return ExactCounts(lambda step: shares, batch_size=lambda step: schedule.counts(step, batch_size=64)[task])


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_scheduled_and_realised_mix_are_drawn(tmp_path: Path) -> None:
    schedule = Schedule(MixConfig(calm_down_steps=60))
    size: dict[str, Any] = {"batch_size": 64, "steps": 100}
    draw_mix(schedule, SHARES, **size, path=tmp_path / "planned.png")
    draw_mix(schedule, SHARES, **size, realised=run_of(schedule, steps=100), path=tmp_path / "realised.png")
    wrong = run_of(schedule, steps=100, swapped=True)
    draw_mix(schedule, SHARES, **size, realised=wrong, path=tmp_path / "wrong.png")
    images = [drawn(tmp_path / f"{name}.png") for name in ("planned", "realised", "wrong")]
    assert all(image.shape == (672, 960, 4) for image in images)
    # A run that kept to the schedule is the picture that was drawn before it; only the legend differs.
    assert np.array_equal(images[0][:500], images[1][:500])
    assert not np.array_equal(images[0][:500], images[2][:500])


def test_half_a_run_shows_half_the_dots(tmp_path: Path) -> None:
    schedule = Schedule(MixConfig(calm_down_steps=60))
    black = []
    for steps in (50, 100):
        run = run_of(schedule, steps=steps)
        draw_mix(schedule, SHARES, batch_size=64, steps=100, realised=run, path=tmp_path / "run.png")
        places = (drawn(tmp_path / "run.png")[60:400, 120:940, :3].sum(2) < 30).any(0)
        black.append(int(np.flatnonzero(places).max()))
    assert black[0] < 450 < 780 < black[1]


def test_the_mix_of_a_run_that_went_back_to_its_start(tmp_path: Path) -> None:
    config = CONFIGS / "demo/um3.yaml"
    rows = run_of(Schedule(MixConfig(calm_down_steps=60)), steps=100)
    for name, more in (("straight", {}), ("back", {"text_validation/restart": 50.0})):
        lines = [json.dumps(row | (more if row["step"] == 40 else {})) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        options = ["--config", str(config), "--out", str(tmp_path / f"{name}.png")]
        main([*options, "--metrics", str(tmp_path / f"{name}.jsonl"), "loop.max_steps=100", "data.codes=absent"])
    straight, back = (drawn(tmp_path / f"{name}.png")[60:400, 120:940] for name in ("straight", "back"))
    assert np.array_equal(straight[:, :350], back[:, :350]) and not np.array_equal(straight[:, 400:], back[:, 400:])


def test_a_run_without_counts_and_one_step_are_no_trouble(tmp_path: Path) -> None:
    schedule = Schedule(MixConfig(start=[1, 0, 0], end=[1, 0, 0], calm_down_steps=0))
    draw_mix(schedule, {"text/a": 1.0}, batch_size=4, steps=1, path=tmp_path / "one.png")
    draw_mix(schedule, {"text/a": 1.0}, batch_size=4, steps=5, realised=[{"step": 1}], path=tmp_path / "none.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_shares_come_from_the_weights_or_from_the_codes(tmp_path: Path) -> None:
    for source, rows in (("photo", 3), ("film", 1)):
        header = ShardHeader(fingerprint="f", bits=8, image_size=16, split="train", source=source)
        codes_BN = np.zeros((rows, 4), dtype=np.int64)
        path = shard_path(tmp_path, split="train", source=source, shard=0)
        write_shard(path, header=header, keys=["k"] * rows, codes_BN=codes_BN, captions=[["c"]] * rows)
    texts = [TextSourceConfig(name="a", weight=3), TextSourceConfig(name="b")]
    config = DataConfig(codes=str(tmp_path), texts=texts)
    images = {"i2t/film": 0.25, "i2t/photo": 0.75, "t2i/film": 0.25, "t2i/photo": 0.75}
    assert source_shares(config) == pytest.approx({"text/a": 0.75, "text/b": 0.25} | images)
    config.image_weights = {"film": 1.0}
    assert source_shares(config)["t2i/film"] == 1.0
    config.codes, config.image_weights = "absent", {}
    assert source_shares(config)["i2t/images"] == 1.0


def test_the_shipped_configs_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config in sorted(CONFIGS.glob("*/um3.yaml")):
        main(["--config", str(config), "--out", str(tmp_path / "mix.png"), "loop.max_steps=50"])
        assert Image.open(tmp_path / "mix.png").size == (960, 672)
        assert "mix.png: the mix of 50 steps of" in capsys.readouterr().out


def test_a_config_without_a_length_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "um3.yaml").write_text("loop: {batch_size: 8}\n")
    with pytest.raises(UserError, match=r"sets no loop\.max_steps; add it"):
        main(["--config", str(tmp_path / "um3.yaml"), "--out", str(tmp_path / "mix.png")])
