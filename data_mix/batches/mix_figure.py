"""The figure of the data mix: the scheduled share of each source, and the samples that a run has read.

`make mix-preview` draws it from a schedule, before or after a run (`draw_mix`); the report draws it from the logged
counts of a run alone (`run_mix_figure`).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_mix.batches.schedule import TASKS, Schedule, Task
from data_mix.order import ExactCounts, fixed_shares
from um3.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[Task, str] = {"text": "text", "i2t": "image → text", "t2i": "text → image"}
COLOURS: dict[Task, str] = {"text": "#4477aa", "i2t": "#ee9933", "t2i": "#44aa77"}
NUM_POINTS = 400  # of the scheduled areas
NUM_DOTS = 60  # each dot is the mean share over its part of the run

Counts = dict[str, float]
"""Values by task and by "task/source"."""


class MixCounts(NamedTuple):
    """Samples read and samples scheduled in all steps before `step`, and tokens of the samples read."""

    step: int
    samples: Counts
    scheduled: Counts
    text_tokens: Counts
    visual_tokens: Counts


class MixShares(NamedTuple):
    """Share of each "task/source" in the samples at `step`; the shares sum to 1."""

    step: float
    shares: Counts


def draw_mix(
    schedule: Schedule,
    shares: Mapping[str, float],
    *,
    batch_size: int,
    steps: int,
    path: str | Path,
    realised: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a PNG of the mix over `steps` steps of `batch_size` samples.

    Args:
        shares: share of each "task/source" in the samples of its task.
        realised: rows of a run's metrics.jsonl, whose counts are drawn as dots. Without rows that have counts, the
            dots show the counts that the schedule gives.
    """
    points = sorted({round(index * max(steps - 1, 1) / (NUM_POINTS - 1)) for index in range(NUM_POINTS)})
    areas = []
    for step in points:
        of_task = schedule.proportions(step)
        areas.append(MixShares(step, {key: of_task[_task(key)] * share for key, share in shares.items()}))
    counts = logged_counts(realised or [])
    label = "samples of the run" if counts else f"samples in batches of {batch_size}"
    counts = counts or _planned_counts(schedule, shares, batch_size=batch_size, steps=steps)
    figure = _mix_figure(areas, counts, label=label, steps=steps, size=(8, 5.6))
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def run_mix_figure(rows: Iterable[Mapping[str, Any]]) -> "Figure | None":
    """The mix that a run has read, from the rows of its metrics.jsonl; None if it logged no counts."""
    counts = logged_counts(rows)
    if not counts:
        return None
    areas = mean_shares([(logged.step, logged.scheduled) for logged in counts], num=NUM_POINTS)
    return _mix_figure(areas, counts, label="samples of the run", steps=counts[-1].step, size=(12, 4.2))


def logged_counts(rows: Iterable[Mapping[str, Any]]) -> list[MixCounts]:
    """The counts in the rows of a metrics.jsonl; rows without counts are skipped."""

    def values(row: Mapping[str, Any], name: str) -> Counts:
        prefix = f"data/{name}/"
        return {key.removeprefix(prefix): float(row[key]) for key in row if key.startswith(prefix)}

    fields = MixCounts._fields[1:]
    return [
        MixCounts(row["step"], *(values(row, name) for name in fields))
        for row in rows
        if any(key.startswith("data/samples/") for key in row)
    ]


def due_samples(schedule: Schedule, shares: Mapping[str, float], *, batch_size: int, step: int) -> Counts:
    """Samples that the schedule gives all batches before `step`, by task and by "task/source"."""
    had = schedule.counts_before(step, batch_size=batch_size)
    due: Counts = {task: count for task, count in schedule.due(step, batch_size=batch_size).items()}
    return due | {key: had[_task(key)] * share for key, share in shares.items()}


def mean_shares(totals: Sequence[tuple[int, Counts]], *, num: int) -> list[MixShares]:
    """Mean shares over about `num` parts of a run; `totals` holds (step, counts of all steps before it)."""
    stride = -(-len(totals) // num)
    ends = [(0, dict[str, float]()), *totals[stride - 1 :: stride]]
    means = []
    for (first, before), (last, after) in itertools.pairwise(ends):
        new = {key: count - before.get(key, 0) for key, count in after.items() if "/" in key}
        if (total := sum(new.values())) > 0:
            means.append(MixShares((first + last - 1) / 2, {key: count / total for key, count in new.items()}))
    return means


def _mix_figure(
    areas: Sequence[MixShares], counts: Sequence[MixCounts], *, label: str, steps: int, size: tuple[float, float]
) -> "Figure":
    """Upper panel: `areas` as areas, `counts` as dots on their borders. Lower panel: `counts` minus the schedule.

    A third panel shows the tokens of each source, where `counts` has them.
    """
    from matplotlib.figure import Figure

    tasks = {_task(key) for _, shares in areas for key, share in shares.items() if share > 0}
    keys = [key for key in {**areas[-1].shares, **counts[-1].samples} if "/" in key and _task(key) in tasks]
    keys.sort(key=lambda key: (TASKS.index(_task(key)), -areas[-1].shares.get(key, 0)))
    figure = Figure(figsize=size, layout="constrained")
    has_tokens = any(counts[-1].text_tokens.values())
    grid = figure.add_gridspec(2, 1 + has_tokens, height_ratios=(3, 1), width_ratios=(4, 1)[: 1 + has_tokens])
    upper = figure.add_subplot(grid[0, 0])
    _draw_shares(upper, areas, counts, keys=keys, label=label)
    upper.set_xlim(0, max(steps - 1, 1))
    upper.tick_params(labelbottom=False)
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    _draw_deviation(lower, counts, keys=keys, tasks=tasks)
    if has_tokens:
        _draw_tokens(figure.add_subplot(grid[:, 1]), counts[-1], keys=keys)
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_shares(
    axes: "Axes", areas: Sequence[MixShares], counts: Sequence[MixCounts], *, keys: Sequence[str], label: str
) -> None:
    stacked = [[shares.get(key, 0) for _, shares in areas] for key in keys]
    names = [f"{LABELS[_task(key)]}: {key.partition('/')[2]}" for key in keys]
    axes.stackplot([step for step, _ in areas], *stacked, colors=[_shade(key, keys) for key in keys], labels=names)
    dots = mean_shares([(row.step, row.samples) for row in counts], num=NUM_DOTS)
    lowest = min(stacked[0])
    for last in range(1, len(keys)):
        borders = [sum(shares.get(key, 0) for key in keys[:last]) for _, shares in dots]
        lowest = min(lowest, *borders)
        dot_label = label if last == 1 else None
        axes.plot([step for step, _ in dots], borders, "o", color="black", markersize=2.5, label=dot_label)
    of_text = [key for key in keys if _task(key) == "text"]
    start, end = (sum(ends.shares.get(key, 0) for key in of_text) for ends in (areas[0], areas[-1]))
    axes.set_title(f"Data mix: text {start:.1%} at the start, {end:.1%} at the end", loc="left")
    axes.set(ylabel="share of the samples", ylim=(max(0.0, lowest - 0.1), 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _draw_deviation(axes: "Axes", counts: Sequence[MixCounts], *, keys: Sequence[str], tasks: set[Task]) -> None:
    largest = 1.0
    for key in [*tasks, *keys]:
        ahead = [row.samples.get(key, 0) - row.scheduled.get(key, 0) for row in counts]
        largest = max([largest, *map(abs, ahead)])
        axes.plot([row.step for row in counts], ahead, color=_shade(key, keys), linewidth=1)
    axes.set(xlabel="step", ylabel="ahead of\nschedule", ylim=(-1.1 * largest, 1.1 * largest))


def _draw_tokens(axes: "Axes", counts: MixCounts, *, keys: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    text, visual = ([counts_of.get(key, 0) for key in keys] for counts_of in (counts.text_tokens, counts.visual_tokens))
    colours = [_shade(key, keys) for key in keys]
    axes.barh(keys, text, color=colours)
    axes.barh(keys, visual, left=text, color=colours, alpha=0.5)
    axes.set(yticks=[], xlabel="tokens: text, visual (pale)")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M" if tokens >= 1e5 else f"{tokens:g}")


def _planned_counts(schedule: Schedule, shares: Mapping[str, float], *, batch_size: int, steps: int) -> list[MixCounts]:
    """The counts of a run that follows the schedule, by the counting that the run itself uses."""
    exact = {}
    for task in dict.fromkeys(map(_task, shares)):
        keys = [key for key in shares if _task(key) == task]
        exact[task] = keys, _exact_counts(schedule, task, [shares[key] for key in keys], batch_size=batch_size)
    counts = []
    for step in sorted({round((index + 1) * steps / NUM_POINTS) for index in range(NUM_POINTS)} - {0}):
        samples: Counts = {task: n for task, n in schedule.counts_before(step, batch_size=batch_size).items()}
        for keys, of_task in exact.values():
            samples |= dict(zip(keys, map(float, of_task.before(step)), strict=True))
        due = due_samples(schedule, shares, batch_size=batch_size, step=step)
        counts.append(MixCounts(step, samples, due, {}, {}))
    return counts


def _exact_counts(schedule: Schedule, task: Task, shares: Sequence[float], *, batch_size: int) -> ExactCounts:
    """Counts by source of one task."""
    parts = fixed_shares(shares)
    return ExactCounts(lambda step: parts, batch_size=lambda step: schedule.counts(step, batch_size=batch_size)[task])


def _task(key: str) -> Task:
    return next(task for task in TASKS if key.partition("/")[0] == task)


def _shade(key: str, keys: Sequence[str]) -> str:
    """The colour of the key's task; smaller sources of the task are paler, the task itself is darkest."""
    from matplotlib.colors import to_hex, to_rgb

    sources = [other for other in keys if _task(other) == _task(key)]
    strength = 0.75 - 0.45 * sources.index(key) / max(len(sources) - 1, 1) if key in sources else 1.0
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[_task(key)]))
    return to_hex((red, green, blue))
