"""The figure of the mix: areas of the schedule, and dots of the samples of a run on their borders."""

from typing import Any

import pytest

from data_mix.batches.mix_figure import draw_mix, logged_counts, mean_shares, run_mix_figure
from data_mix.batches.schedule import MixConfig, Schedule


def test_a_run_is_drawn_from_the_differences_of_its_counts_with_its_tokens_if_it_logged_them() -> None:
    counts = {"text": 3.0, "text/docs": 3.0, "i2t": 1.0, "i2t/scenes": 1.0}
    rows: list[dict[str, Any]] = [{"step": 1, "train/loss": 1.0}]
    assert run_mix_figure(rows) is None
    for step in range(2, 12):
        logged = {f"data/{n}/{key}": count * step for n in ("samples", "scheduled") for key, count in counts.items()}
        rows.append({"step": step} | logged)
    totals = [(row.step, row.samples) for row in logged_counts(rows)]
    assert len(totals) == 10, "rows without counts are skipped"
    for _, shares in mean_shares(totals, num=4):
        assert shares == pytest.approx({"text/docs": 0.75, "i2t/scenes": 0.25})
    figure = run_mix_figure(rows)
    assert figure is not None and len(figure.axes) == 2
    assert figure.axes[0].get_title(loc="left") == "Data mix: text 75.0% at the start, 75.0% at the end"
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(0.75) and not figure.axes[1].lines[0].get_ydata().any()
    rows[-1] |= {"data/text_tokens/text/docs": 500.0, "data/visual_tokens/i2t/scenes": 160.0}
    figure = run_mix_figure(rows)
    assert figure is not None and [bar.get_width() for bar in figure.axes[2].patches] == [500, 0, 0, 160]


@pytest.mark.parametrize("steps", [1, 100])
def test_the_counts_of_a_schedule_lie_on_it(steps: int) -> None:
    shares = {"text/prose": 0.75, "text/notes": 0.25, "i2t/photo": 1.0, "t2i/photo": 1.0}
    figure = draw_mix(Schedule(MixConfig(calm_down_steps=60)), shares, batch_size=64, steps=steps)
    upper, lower = figure.axes
    assert upper.get_title(loc="left").startswith("Data mix: text 93.8% at the start")
    prose, text, *_ = (line.get_ydata() for line in upper.lines)
    assert prose[0] == pytest.approx(0.75 * 15 / 16, abs=0.02) and text[-1] == pytest.approx(prose[-1] / 0.75, abs=0.02)
    assert all(abs(line.get_ydata()).max() < 1 for line in lower.lines)
