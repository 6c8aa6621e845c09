"""The figure of the data mix: areas of the schedule, with the dots of a run on their borders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_mix.batches.config import DataConfig
from data_mix.batches.mix_preview import draw_mix, due_samples, main, source_shares
from data_mix.batches.schedule import TASKS, MixConfig, Schedule, Task
from data_mix.order import ExactCounts, fixed_shares
from data_mix.sources.text import TextSourceConfig
from tests.helpers.code_shards import write_codes
from um3.core.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"
SHARES = {"text/prose": 0.75, "text/notes": 0.25, "i2t/photo": 1.0, "t2i/photo": 1.0}
SCHEDULE = Schedule(MixConfig(calm_down_steps=60))


def metrics_of_run(*, steps: int, swapped: bool = False) -> list[dict[str, float]]:
    """metrics.jsonl of a run that keeps to the schedule, or that swaps the counts of two sources."""
    rows: list[dict[str, float]] = [{"step": step, "train/loss": 1.0} for step in range(3)]
    counts = {task: counts_of(task) for task in TASKS}
    for step in range(1, steps + 1):
        samples = {"text/prose": counts["text"].before(step)[0], "text/notes": counts["text"].before(step)[1]}
        if swapped:
            samples["text/prose"], samples["text/notes"] = samples["text/notes"], samples["text/prose"]
        samples |= {f"{task}/photo": counts[task].before(step)[0] for task in TASKS[1:]}
        samples |= dict(SCHEDULE.counts_before(step, batch_size=64))
        due = due_samples(SCHEDULE, SHARES, batch_size=64, step=step)
        row = {f"data/samples/{key}": count for key, count in samples.items()}
        rows.append({"step": step} | row | {f"data/scheduled/{key}": count for key, count in due.items()})
    return rows


def counts_of(task: Task) -> ExactCounts:
    shares = fixed_shares([share for key, share in SHARES.items() if key.startswith(f"{task}/")])
    return ExactCounts(lambda step: shares, batch_size=lambda step: SCHEDULE.counts(step, batch_size=64)[task])


def drawn(path: Path, *, shares: dict[str, float] = SHARES, steps: int = 100, realised: Any = None) -> np.ndarray:
    draw_mix(SCHEDULE, shares, batch_size=64, steps=steps, realised=realised, path=path)
    return np.asarray(Image.open(path))


def test_dots_of_a_run_show_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "mix.png"
    planned, realised = drawn(path), drawn(path, realised=metrics_of_run(steps=100))
    assert planned.shape == (672, 960, 4)
    # A run that kept to the schedule looks like the plan; only the legend differs.
    assert np.array_equal(planned[:500], realised[:500])
    assert not np.array_equal(planned[:500], drawn(path, realised=metrics_of_run(steps=100, swapped=True))[:500])
    half = drawn(path, realised=metrics_of_run(steps=50))
    last_dot = [
        int(np.flatnonzero((image[60:400, 120:940, :3].sum(2) < 30).any(0)).max()) for image in (half, realised)
    ]
    assert last_dot[0] < 450 < 780 < last_dot[1]


def test_one_step_and_a_run_without_counts_are_drawn(tmp_path: Path) -> None:
    for options in ({"steps": 1}, {"steps": 5, "realised": [{"step": 1}]}):
        assert drawn(tmp_path / "mix.png", shares={"text/a": 1.0}, **options).std() > 0


def test_shares_come_from_the_weights_or_from_the_codes(tmp_path: Path) -> None:
    for source, num_images in (("photo", 3), ("film", 1)):
        write_codes(tmp_path, source=source, num_images=num_images)
    config = DataConfig(str(tmp_path), texts=[TextSourceConfig(name="a", weight=3), TextSourceConfig(name="b")])
    images = {"i2t/film": 0.25, "i2t/photo": 0.75, "t2i/film": 0.25, "t2i/photo": 0.75}
    assert source_shares(config) == pytest.approx({"text/a": 0.75, "text/b": 0.25} | images)
    config.image_weights = {"film": 1.0}
    assert source_shares(config)["t2i/film"] == 1.0
    config.codes, config.image_weights = "absent", {}
    assert source_shares(config)["i2t/images"] == 1.0


@pytest.mark.parametrize("name", ["demo", "um3_llama3_1b"])
def test_shipped_configs_are_drawn(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--out", str(tmp_path / "mix.png")]
    main([*arguments, "loop.max_steps=50", "optimizer.lr=1", "--metrics", str(tmp_path / "absent.jsonl")])
    assert Image.open(tmp_path / "mix.png").size == (960, 672)
    assert "mix of 50 steps of" in capsys.readouterr().out


def test_a_config_without_a_length_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("um3: {loop: {batch_size: 8}}\n")
    with pytest.raises(UserError, match=r"loop\.max_steps to None; pass loop\.max_steps"):
        main(["--config", str(tmp_path / "short.yaml"), "--out", str(tmp_path / "mix.png")])
