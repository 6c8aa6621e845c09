"""The figure of a run's mix, from its logged counts alone (the preview's tests draw it from a schedule)."""

from typing import Any

import pytest

from data_mix.batches.mix_figure import logged_counts, mean_shares, run_mix_figure


def metrics(**more: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 1, "train/loss": 1.0}]
    for step in range(2, 12):
        counts = {"text": 3.0, "text/docs": 3.0, "i2t": 1.0, "i2t/scenes": 1.0, **more}
        rows.append({"step": step} | {f"data/samples/{key}": count * step for key, count in counts.items()})
        rows[-1] |= {f"data/scheduled/{key}": count * step for key, count in counts.items()}
    return rows


def test_shares_come_from_the_differences_of_the_counts() -> None:
    totals = [(row.step, row.samples) for row in logged_counts(metrics())]
    assert len(totals) == 10, "rows without counts are skipped"
    for _, shares in mean_shares(totals, num=4):
        assert shares == pytest.approx({"text/docs": 0.75, "i2t/scenes": 0.25})


def test_a_run_is_drawn_with_its_tokens_if_it_logged_them() -> None:
    assert run_mix_figure([{"step": 1}]) is None
    rows = metrics()
    figure = run_mix_figure(rows)
    assert figure is not None and len(figure.axes) == 2
    assert figure.axes[0].get_title(loc="left") == "Data mix: text 75.0% at the start, 75.0% at the end"
    rows[-1] |= {"data/text_tokens/text/docs": 500.0, "data/visual_tokens/i2t/scenes": 160.0}
    figure = run_mix_figure(rows)
    assert figure is not None and [bar.get_width() for bar in figure.axes[2].patches] == [500, 0, 0, 160]
