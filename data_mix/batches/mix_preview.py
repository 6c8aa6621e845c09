"""The data mix as a picture: what is scheduled, and what a run has really had (`make mix-preview`)."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_mix.batches.config import DataConfig
from data_mix.batches.schedule import TASKS, Schedule, Task
from data_mix.order import ExactCounts, fixed_shares
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError
from um3.core.files import atomic_file
from um3.core.metrics import read_metrics

LABELS: dict[Task, str] = {"text": "text", "i2t": "image to text", "t2i": "text to image"}
COLOURS: dict[Task, str] = {"text": "#4477aa", "i2t": "#ee9933", "t2i": "#44aa77"}
NUM_POINTS = 400  # of the scheduled curves
NUM_DOTS = 60  # of the realised mix: each is the mean over its part of the run

Counts = dict[str, float]
"""Samples by "task/source"."""


@dataclass
class PreviewConfig:
    """The sections of a UM3 training config; only `data`, loop.max_steps and loop.batch_size are read here."""

    data: DataConfig = field(default_factory=DataConfig)
    loop: dict[str, Any] = field(default_factory=dict)
    engine: Any = None
    optimizer: Any = None
    loss: Any = None
    model: Any = None
    vocabulary: Any = None
    text_validation: Any = None
    evaluate: Any = None
    visual_tokenizer: Any = None


def main(arguments: Sequence[str]) -> None:
    """Draw the mix of a UM3 config."""
    parser = command_parser("python -m data_mix mix-preview", "Draw the data mix of a UM3 config.", config="required")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--metrics", help="metrics.jsonl of a run, to draw the mix it has had")
    config, options = read_config(PreviewConfig, parser, section="um3", arguments=arguments)
    missing = [key for key in ("max_steps", "batch_size") if not isinstance(config.loop.get(key), int)]
    if missing:
        raise UserError(f"{options.config} sets no loop.{missing[0]}; add it, or give loop.{missing[0]}=NUMBER")
    steps, batch_size = config.loop["max_steps"], config.loop["batch_size"]
    shares = source_shares(config.data)
    realised = read_metrics(options.metrics) if options.metrics else None
    schedule = Schedule(config.data.mix, restarts=restarts(realised or []))
    draw_mix(schedule, shares, batch_size=batch_size, steps=steps, path=options.out, realised=realised)
    print(f"{options.out}: the mix of {steps} steps of {batch_size} samples")
    for key, count in due_samples(schedule, shares, batch_size=batch_size, step=steps).items():
        print(f"  {key}: {count:,.0f}")


def source_shares(config: DataConfig) -> dict[str, float]:
    """Share of each "task/source" in the samples of its task; "images" for all codes where there are none yet."""
    texts = {source.name: source.weight for source in config.texts} or {"none": 1.0}
    images: Mapping[str, float] = config.image_weights
    if not images and Path(config.codes).is_dir():
        from data_mix.codes.shards import shard_footers

        found: Counter[str] = Counter()
        for footer in shard_footers(config.codes).values():
            if footer.header.split == "train":
                found[footer.header.source] += footer.num_images
        images = dict(sorted(found.items()))
    shares: dict[str, float] = {}
    for task in TASKS:
        weights = texts if task == "text" else images or {"images": 1.0}
        total = sum(fixed_shares(list(weights.values()), of=f"{task} sources {list(weights)}"))
        parts = zip(weights, fixed_shares(list(weights.values())), strict=True)
        shares |= {f"{task}/{name}": share / total for name, share in parts}
    return shares


def due_samples(schedule: Schedule, shares: Mapping[str, float], *, batch_size: int, step: int) -> Counts:
    """What is scheduled in all batches before `step`, as `UM3Rows.due` has it."""
    had = schedule.counts_before(step, batch_size=batch_size)
    due: Counts = {task: count for task, count in schedule.due(step, batch_size=batch_size).items()}
    return due | {key: had[_task(key)] * share for key, share in shares.items()}


def draw_mix(
    schedule: Schedule,
    shares: Mapping[str, float],
    *,
    batch_size: int,
    steps: int,
    path: str | Path,
    realised: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Draw to a PNG the share of each source over `steps` steps, and how far the counts are from the schedule.

    `shares`: see `source_shares`. `realised`: rows of a run's metrics.jsonl; what it has had (data/samples/...) is
    drawn as dots at the borders between the areas, where they must lie, and below them against data/scheduled/...;
    without it, or with rows that do not tell, the counts that the schedule gives for batches of `batch_size`.
    """
    from matplotlib.figure import Figure

    had = _realised(realised or [])
    what = "of the run" if had else f"in batches of {batch_size}"
    had = had or _planned(schedule, shares, batch_size=batch_size, steps=steps)
    drawn = {_task(key) for key in shares if any(schedule.proportions(step)[_task(key)] for step in (0, steps))}
    keys = [key for key in {**shares, **had[-1].samples} if "/" in key and _task(key) in drawn]
    keys.sort(key=lambda key: TASKS.index(_task(key)))

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    places = sorted({round(i * max(steps - 1, 1) / (NUM_POINTS - 1)) for i in range(NUM_POINTS)})
    areas = [[schedule.proportions(step)[_task(key)] * shares.get(key, 0) for step in places] for key in keys]
    names = [f"{LABELS[_task(key)]}: {key.partition('/')[2]}" for key in keys]
    upper.stackplot(places, *areas, colors=[_shade(key, keys) for key in keys], labels=names)
    lowest = min(areas[0])
    means = _means(had)
    at = [step for step, _ in means]
    for last in range(len(keys) - 1):
        border = [sum(counts.get(key, 0) for key in keys[: last + 1]) for _, counts in means]
        lowest = min(lowest, *border)
        upper.plot(at, border, "o", color="black", markersize=2.5, label=f"samples {what}" if last == 0 else None)
    start, end = schedule.proportions(0)["text"], schedule.proportions(steps)["text"]
    upper.set_title(f"Data mix: text {start:.1%} at the start, {end:.1%} at the end", loc="left")
    upper.set(ylabel="share of the samples", xlim=(0, max(steps - 1, 1)), ylim=(max(0.0, lowest - 0.1), 1))
    upper.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")

    largest = 1.0
    for key in [*drawn, *keys]:
        ahead = [each.samples.get(key, 0) - each.due.get(key, 0) for each in had]
        largest = max([largest, *map(abs, ahead)])
        lower.plot([each.step for each in had], ahead, color=_shade(key, keys), linewidth=1)
    lower.set(xlabel="step", ylabel="samples had\n− scheduled", ylim=(-1.1 * largest, 1.1 * largest))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


class _Had(NamedTuple):
    """Samples had and scheduled in all steps before `step`, by task and by "task/source"."""

    step: int
    samples: Counts
    due: Counts


def _realised(rows: Sequence[Mapping[str, Any]]) -> list[_Had]:
    """What the logged steps of a run say."""

    def of(row: Mapping[str, Any], name: str) -> Counts:
        return {key.removeprefix(name): float(row[key]) for key in row if key.startswith(name)}

    return [
        _Had(row["step"], of(row, "data/samples/"), of(row, "data/scheduled/"))
        for row in rows
        if any(key.startswith("data/samples/") for key in row)
    ]


def _planned(schedule: Schedule, shares: Mapping[str, float], *, batch_size: int, steps: int) -> list[_Had]:
    """What a run will have had, by the counting that the run itself uses."""
    exact = {}
    for task in dict.fromkeys(map(_task, shares)):
        mine = [key for key in shares if _task(key) == task]
        exact[task] = mine, _of_task(schedule, task, [shares[key] for key in mine], batch_size=batch_size)
    had = []
    for step in sorted({round((i + 1) * steps / NUM_POINTS) for i in range(NUM_POINTS)} - {0}):
        samples: Counts = {task: n for task, n in schedule.counts_before(step, batch_size=batch_size).items()}
        for mine, counts in exact.values():
            samples |= dict(zip(mine, map(float, counts.before(step)), strict=True))
        had.append(_Had(step, samples, due_samples(schedule, shares, batch_size=batch_size, step=step)))
    return had


def _of_task(schedule: Schedule, task: Task, shares: Sequence[float], *, batch_size: int) -> ExactCounts:
    """Counts by source of one task."""
    parts = fixed_shares(shares)
    return ExactCounts(lambda step: parts, batch_size=lambda step: schedule.counts(step, batch_size=batch_size)[task])


def restarts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps at which the forgetting guard of a run had the calm-down begin anew."""
    return [int(row["text_validation/restart"]) for row in rows if "text_validation/restart" in row]


def _means(had: Sequence[_Had]) -> list[tuple[float, Counts]]:
    """(step, share of each source) between some of the counts, each about a NUM_DOTS-th of them after the last."""
    stretch = -(-len(had) // NUM_DOTS)
    ends = [_Had(0, {}, {}), *had[stretch - 1 :: stretch]]
    means = []
    for start, end in itertools.pairwise(ends):
        new = {key: count - start.samples.get(key, 0) for key, count in end.samples.items() if "/" in key}
        if (total := sum(new.values())) > 0:
            means.append(((start.step + end.step - 1) / 2, {key: count / total for key, count in new.items()}))
    return means


def _task(key: str) -> Task:
    return next(task for task in TASKS if key.partition("/")[0] == task)


def _shade(key: str, keys: Sequence[str]) -> tuple[float, ...]:
    """The colour of the key's task, paler for each further source of it; darkest the task's own."""
    from matplotlib.colors import to_rgb

    mine = [other for other in keys if _task(other) == _task(key)]
    strength = 0.75 - 0.45 * mine.index(key) / max(len(mine) - 1, 1) if key in mine else 1.0
    return tuple(1 - strength * (1 - part) for part in to_rgb(COLOURS[_task(key)]))
