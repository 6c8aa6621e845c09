"""The figure of the data mix: the scheduled share of each source, and the samples that a run has read."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from data_mix.batches.schedule import TASKS, Schedule, Task, task_of
from data_mix.order import fixed_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[Task, str] = {"text": "text", "i2t": "image → text", "t2i": "text → image"}
COLOURS: dict[Task, str] = {"text": "#4477aa", "i2t": "#ee9933", "t2i": "#44aa77"}
NUM_POINTS = 400  # of the scheduled areas
NUM_DOTS = 60  # each dot is the mean share over its part of the run

Counts = dict[str, float]
"""Values by task and by "task/source"."""
Shares = list[tuple[float, Counts]]
"""Steps, and the share of each "task/source" in the samples of each; the shares of a step sum to 1."""


class MixCounts(NamedTuple):
    """Samples read and samples scheduled in all steps before `step`, and tokens of the samples read."""

    step: int
    samples: Counts
    scheduled: Counts
    text_tokens: Counts
    visual_tokens: Counts


def draw_mix(schedule: Schedule, shares: Counts, *, batch_size: int, steps: int) -> "Figure":
    """The scheduled mix, and the exact counts that a run of `steps` batches will read.

    shares: share of each "task/source" in the samples of its task.
    """
    areas: Shares = []
    for step in sorted({round(index * max(steps - 1, 1) / (NUM_POINTS - 1)) for index in range(NUM_POINTS)}):
        of_task = schedule.proportions(step)
        areas.append((step, {key: of_task[task_of(key)] * share for key, share in shares.items()}))
    counts = _planned_counts(schedule, shares, batch_size=batch_size, steps=steps)
    return _mix_figure(areas, counts, label=f"samples in batches of {batch_size}", steps=steps, size=(8, 5.6))


def run_mix_figure(rows: Iterable[Mapping[str, Any]]) -> "Figure | None":
    """The mix that a run has read, from the rows of its metrics.jsonl; None if it logged no counts."""
    if not (counts := logged_counts(rows)):
        return None
    areas = mean_shares([(logged.step, logged.scheduled) for logged in counts], num=NUM_POINTS)
    return _mix_figure(areas, counts, label="samples of the run", steps=counts[-1].step, size=(12, 4.2))


def logged_counts(rows: Iterable[Mapping[str, Any]]) -> list[MixCounts]:
    """The counts in the rows of a metrics.jsonl; rows without counts are skipped."""
    counts = []
    for row in rows:
        values: dict[str, Counts] = {name: {} for name in MixCounts._fields[1:]}
        for key, value in row.items():
            room, name, source, *_ = (*key.split("/", 2), "", "")
            if room == "data" and name in values:
                values[name][source] = float(value)
        if values["samples"]:
            counts.append(MixCounts(row["step"], **values))
    return counts


def mean_shares(totals: Sequence[tuple[int, Counts]], *, num: int) -> Shares:
    """Mean shares over about `num` parts of a run; `totals` holds (step, counts of all steps before it)."""
    stride = -(-len(totals) // num)
    ends = [(0, dict[str, float]()), *totals[stride - 1 :: stride]]
    means: Shares = []
    for (first, before), (last, after) in itertools.pairwise(ends):
        new = {key: count - before.get(key, 0) for key, count in after.items() if "/" in key}
        if (total := sum(new.values())) > 0:
            means.append(((first + last - 1) / 2, {key: count / total for key, count in new.items()}))
    return means


def _planned_counts(schedule: Schedule, shares: Counts, *, batch_size: int, steps: int) -> list[MixCounts]:
    """The counts of a run that follows the schedule, by the counting that the run itself uses."""
    exact = {}
    for task in dict.fromkeys(map(task_of, shares)):
        keys = [key for key in shares if task_of(key) == task]
        parts = fixed_shares([shares[key] for key in keys])
        exact[task] = keys, schedule.source_counts(task, parts, batch_size=batch_size)
    counts = []
    for step in sorted({round((index + 1) * steps / NUM_POINTS) for index in range(NUM_POINTS)} - {0}):
        samples: Counts = {task: n for task, n in schedule.counts_before(step, batch_size=batch_size).items()}
        for keys, of_task in exact.values():
            samples |= zip(keys, of_task.before(step), strict=True)
        counts.append(MixCounts(step, samples, schedule.due_samples(shares, batch_size=batch_size, step=step), {}, {}))
    return counts


def _mix_figure(
    areas: Shares, counts: Sequence[MixCounts], *, label: str, steps: int, size: tuple[float, float]
) -> "Figure":
    """Panels: `areas` with `counts` as dots on their borders, `counts` minus the schedule, and tokens if counted."""
    from matplotlib.figure import Figure

    last = counts[-1]
    used = {task_of(key) for _, shares in areas for key, share in shares.items() if share > 0}
    tasks = [task for task in TASKS if task in used]
    keys = [key for key in {**areas[-1][1], **last.samples} if "/" in key and task_of(key) in tasks]
    keys.sort(key=lambda key: (TASKS.index(task_of(key)), -areas[-1][1].get(key, 0)))
    colours = {key: _shade(key, keys) for key in (*tasks, *keys)}
    figure = Figure(figsize=size, layout="constrained")
    has_tokens = any(last.text_tokens.values())
    grid = figure.add_gridspec(2, 1 + has_tokens, height_ratios=(3, 1), width_ratios=(4, 1)[: 1 + has_tokens])
    upper = figure.add_subplot(grid[0, 0])
    _draw_shares(upper, areas, counts, colours={key: colours[key] for key in keys}, label=label)
    upper.set_xlim(0, max(steps - 1, 1))
    upper.tick_params(labelbottom=False)
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    largest = 1.0
    for key, colour in colours.items():
        ahead = [row.samples.get(key, 0) - row.scheduled.get(key, 0) for row in counts]
        largest = max([largest, *map(abs, ahead)])
        lower.plot([row.step for row in counts], ahead, color=colour, linewidth=1)
    lower.set(xlabel="step", ylabel="ahead of\nschedule", ylim=(-1.1 * largest, 1.1 * largest))
    if has_tokens:
        axes, left = figure.add_subplot(grid[:, 1]), [0.0] * len(keys)
        for tokens, alpha in ((last.text_tokens, 1.0), (last.visual_tokens, 0.5)):
            widths = [tokens.get(key, 0.0) for key in keys]
            axes.barh(keys, widths, left=left, color=[colours[key] for key in keys], alpha=alpha)
            left = widths
        axes.set(yticks=[], xlabel="tokens: text, visual (pale)")
        axes.locator_params(axis="x", nbins=3)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M" if tokens >= 1e5 else f"{tokens:g}")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_shares(
    axes: "Axes", areas: Shares, counts: Sequence[MixCounts], *, colours: Mapping[str, str], label: str
) -> None:
    keys = list(colours)
    stacked = [[shares.get(key, 0) for _, shares in areas] for key in keys]
    names = [f"{LABELS[task_of(key)]}: {key.partition('/')[2]}" for key in keys]
    axes.stackplot([step for step, _ in areas], *stacked, colors=list(colours.values()), labels=names)
    dots = mean_shares([(row.step, row.samples) for row in counts], num=NUM_DOTS)
    lowest = min(stacked[0])
    for last in range(1, len(keys)):
        borders = [sum(shares.get(key, 0) for key in keys[:last]) for _, shares in dots]
        lowest = min(lowest, *borders)
        dot_label = label if last == 1 else None
        axes.plot([step for step, _ in dots], borders, "o", color="black", markersize=2.5, label=dot_label)
    texts = [key for key in keys if task_of(key) == "text"]
    start, end = (sum(shares.get(key, 0) for key in texts) for _, shares in (areas[0], areas[-1]))
    axes.set_title(f"Data mix: text {start:.1%} at the start, {end:.1%} at the end", loc="left")
    axes.set(ylabel="share of the samples", ylim=(max(0.0, lowest - 0.1), 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _shade(key: str, keys: Sequence[str]) -> str:
    """The colour of the key's task; smaller sources of the task are paler, the task itself is darkest."""
    from matplotlib.colors import to_hex, to_rgb

    sources = [other for other in keys if task_of(other) == task_of(key)]
    strength = 0.75 - 0.45 * sources.index(key) / max(len(sources) - 1, 1) if key in sources else 1.0
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[task_of(key)]))
    return to_hex((red, green, blue))
