"""The data mix as a picture: what is scheduled, and what a run has really had (`make mix-preview`)."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_mix.config import DataConfig
from data_mix.schedule import TASKS, Schedule, Task
from um3.core.config import load_config
from um3.core.errors import UserError, run_main
from um3.core.files import atomic_file
from um3.core.metrics import read_metrics

LABELS: dict[Task, str] = {"text": "text only", "i2t": "image to text", "t2i": "text to image"}
COLOURS: dict[Task, str] = {"text": "#4477aa", "i2t": "#ee9933", "t2i": "#44aa77"}
NUM_POINTS = 400  # of the scheduled curves
NUM_DOTS = 60  # of the realised mix: each is the mean over its part of the run


@dataclass
class PreviewConfig:
    """The sections of a UM3 training config; only `data`, loop.total_steps and loop.batch_size are read here."""

    data: DataConfig = field(default_factory=DataConfig)
    loop: dict[str, Any] = field(default_factory=dict)
    engine: Any = None
    optimizer: Any = None
    loss: Any = None
    model: Any = None
    vocabulary: Any = None
    qlip: Any = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the mix of a UM3 config."""
    parser = argparse.ArgumentParser(prog="python -m data_mix.preview", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a UM3 training")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--metrics", help="metrics.jsonl of a run, to draw the mix it has had")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the file's")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(PreviewConfig, path=options.config, overrides=options.overrides)
    missing = [key for key in ("total_steps", "batch_size") if not isinstance(config.loop.get(key), int)]
    if missing:
        raise UserError(f"{options.config} sets no loop.{missing[0]}; add it, or give loop.{missing[0]}=NUMBER")
    steps, batch_size = config.loop["total_steps"], config.loop["batch_size"]
    realised = read_metrics(options.metrics) if options.metrics else None
    draw_mix(Schedule(config.data.mix), batch_size=batch_size, steps=steps, path=options.out, realised=realised)
    print(f"{options.out}: the mix of {steps} steps of {batch_size} rows")


def draw_mix(
    schedule: Schedule,
    *,
    batch_size: int,
    steps: int,
    path: str | Path,
    realised: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Draw the share of each task over `steps` steps to a PNG.

    `realised`: rows of a run's metrics.jsonl (data/rows_text, data/rows_i2t, data/rows_t2i); they are drawn as
    dots at the borders between the areas, where they must lie. Without them the counts the schedule
    gives for batches of `batch_size` are drawn instead.
    """
    from matplotlib.figure import Figure

    places = sorted({round(i * max(steps - 1, 1) / (NUM_POINTS - 1)) for i in range(NUM_POINTS)})
    shares = {task: [schedule.proportions(step)[task] for step in places] for task in TASKS}
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(places, *shares.values(), colors=COLOURS.values(), alpha=0.55, labels=LABELS.values())

    had = _realised(realised) if realised else _planned(schedule, batch_size=batch_size, steps=steps)
    at = [step for step, _ in had]
    text = [counts["text"] for _, counts in had]
    what = "of the run" if realised else f"in batches of {batch_size} rows"
    axes.plot(at, text, "o", color="black", markersize=3, label=f"rows {what}")
    axes.plot(at, [counts["text"] + counts["i2t"] for _, counts in had], "o", color="black", markersize=3)

    first, last = schedule.proportions(0), schedule.proportions(steps)
    axes.set_title(f"Data mix: text {first['text']:.1%} at the start, {last['text']:.1%} at the end", loc="left")
    lowest = min([*shares["text"], *text])
    axes.set(xlabel="step", ylabel="share of the rows", xlim=(0, max(steps - 1, 1)), ylim=(max(0.0, lowest - 0.1), 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


Shares = list[tuple[float, dict[Task, float]]]


def _realised(rows: Sequence[Mapping[str, Any]]) -> Shares:
    """(step, share of each task) of the run: means over stretches of logged steps."""
    counted = [row for row in rows if all(f"data/rows_{task}" in row for task in TASKS)]
    return _means([(row["step"], {task: float(row[f"data/rows_{task}"]) for task in TASKS}) for row in counted])


def _planned(schedule: Schedule, *, batch_size: int, steps: int) -> Shares:
    return _means(
        [
            (step, {t: float(n) for t, n in schedule.counts(step, batch_size=batch_size).items()})
            for step in range(steps)
        ]
    )


def _means(counts: Shares) -> Shares:
    stretch = -(-len(counts) // NUM_DOTS)
    means: Shares = []
    for start in range(0, len(counts), max(stretch, 1)):
        part = counts[start : start + stretch]
        sums = {task: sum(rows[task] for _, rows in part) for task in TASKS}
        total = sum(sums.values())
        if total:
            means.append((sum(step for step, _ in part) / len(part), {task: sums[task] / total for task in TASKS}))
    return means


if __name__ == "__main__":
    run_main(main)
