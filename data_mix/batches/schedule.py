"""Calm-down: how the share of text samples falls at the start of UM3's training (paper, section 4, Eq 7)."""

import functools
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from data_mix.order import ExactCounts, fixed_shares
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, Range

Task = Literal["text", "i2t", "t2i"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass
class MixConfig:
    """Ratios of text-only : image-to-text : text-to-image samples, at step 0 and from `calm_down_steps` on.

    mode: what is linear in between. "proportion": the share of each task (Eq 7 as the paper words it: text goes from
        60/64 = 0.9375 to 12/16 = 0.75). "weight": the ratios themselves (text goes from 60 to 12).
    """

    start: Annotated[list[NonNegativeFloat], Range(3, 3)] = field(default_factory=lambda: [60.0, 1.0, 3.0])
    end: Annotated[list[NonNegativeFloat], Range(3, 3)] = field(default_factory=lambda: [12.0, 1.0, 3.0])
    calm_down_steps: NonNegativeInt = 10_000
    mode: Literal["proportion", "weight"] = "proportion"

    def __post_init__(self) -> None:
        if not (sum(self.start) and sum(self.end)):
            raise ValueError(f"mix.start={self.start}, mix.end={self.end}: one ratio of each must be above 0")


class Schedule:
    """The mix of every step: the real-valued shares, and the exact sample counts of every global batch."""

    def __init__(self, config: MixConfig) -> None:
        self.config = config
        self._exact = functools.cache(self._make_counts)

    def proportions(self, step: int) -> dict[Task, float]:
        """Scheduled share of each task at `step`; they sum to 1."""
        start, end, progress = self.config.start, self.config.end, self._progress(step)
        if self.config.mode == "proportion":
            start, end = _normalised(start), _normalised(end)
        ratios = [r0 + (rT - r0) * progress for r0, rT in zip(start, end, strict=True)]
        return dict(zip(TASKS, _normalised(ratios), strict=True))

    def counts(self, step: int, *, batch_size: int) -> dict[Task, int]:
        """Samples of each task in the batch of `step`. Their sum over all steps is within one of the schedule."""
        return dict(zip(TASKS, self._exact(batch_size).at(step), strict=True))

    def counts_before(self, step: int, *, batch_size: int) -> dict[Task, int]:
        """Samples of each task in all batches before `step`."""
        return dict(zip(TASKS, self._exact(batch_size).before(step), strict=True))

    def due_samples(self, shares: dict[str, float], *, batch_size: int, step: int) -> dict[str, float]:
        """Samples due before `step`: by task the sum of the proportions, which `counts_before` rounds, and by
        "task/source" the source's share of the task's whole samples."""
        due, had = self._exact(batch_size).due(step), self.counts_before(step, batch_size=batch_size)
        tasks: dict[str, float] = {task: due[TASKS.index(task)] for task in map(task_of, shares)}
        return tasks | {key: had[task_of(key)] * share for key, share in shares.items()}

    def source_counts(self, task: Task, shares: tuple[int, ...], *, batch_size: int) -> ExactCounts:
        """Samples of each source of a task, by the sources' `shares` of it (`fixed_shares`)."""
        return ExactCounts(lambda _: shares, batch_size=lambda step: self.counts(step, batch_size=batch_size)[task])

    def _make_counts(self, batch_size: int) -> ExactCounts:
        end = fixed_shares(self.config.end)

        def shares(step: int) -> tuple[int, ...]:
            return end if self._progress(step) == 1 else fixed_shares(list(self.proportions(step).values()))

        return ExactCounts(shares, batch_size=lambda _: batch_size)

    def _progress(self, step: int) -> float:
        """Finished share of the calm-down, 0 to 1."""
        total = self.config.calm_down_steps
        return min(step / total, 1.0) if total else 1.0


def task_of(key: str) -> Task:
    """The task of a "task/source"."""
    return next(task for task in TASKS if key.partition("/")[0] == task)


def _normalised(ratios: list[float]) -> list[float]:
    return [ratio / sum(ratios) for ratio in ratios]
