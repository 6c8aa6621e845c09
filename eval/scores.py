"""A number that leaves `eval/` is a `Score`: value, sample count, seed, protocol, commit, and the paper's value.

A measurement that could not be made is a row as well, without a value and with a note that says why, so that a
report never looks complete because something is missing.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from um3.core import provenance
from um3.core.errors import UserError
from um3.core.files import read_json, write_json

Unit = Literal["%", "x100", "dB", ""]
RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """Ends of a confidence interval; None where there is none to give."""

    low: float | None
    high: float | None


def bootstrap(values: Sequence[float], *, weights: Sequence[float] | None = None) -> Interval:
    """The 95 % percentile bootstrap interval of sum(values) / sum(weights), by default of the mean.

    The items are drawn 1,000 times with replacement from a fixed seed: equal items give an equal interval. Items that
    are all alike (or fewer than two) give none, since resampling them shows no spread although more items might.
    """
    array = np.asarray(values, dtype=np.float64)
    share = np.ones_like(array) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.shape != share.shape:
        raise ValueError(f"{array.size} values and {share.size} weights; each value needs its own")
    if len(np.unique(array / share)) < 2:
        return Interval(None, None)
    generator, drawn = np.random.default_rng(0), np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        chosen = generator.integers(array.size, size=array.size)
        drawn[index] = array[chosen].sum() / share[chosen].sum()
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


@functools.cache
def _commit() -> str:
    return provenance.commit()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured value. Shares (accuracies, BLEU, CIDEr, ...) are fractions; the units "%" and "x100" only
    say how to show them.

    `n` counts what was scored and `skipped` what was asked for and could not be scored; `protocol` holds every setting
    that two values must share to be comparable. `low` and `high` are the ends of the 95 % interval (`bootstrap`), None
    where the value is no mean over items (a Frechet distance).

    Raises:
        ValueError: a value that is not finite, no value and no note that says why, or half an interval.
    """

    task: str
    metric: str
    value: float | None
    n: int
    seed: int
    protocol: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    unit: Unit = ""
    higher_is_better: bool = True
    paper: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    version: str = "1"
    commit: str = field(default_factory=_commit)

    def __post_init__(self) -> None:
        if self.value is None and not self.note:
            raise ValueError(f"{self.key} has no value and no note that says why")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.key} = {self.value} is no number to report; give None and a note")
        ends = [end for end in (self.low, self.high) if end is not None]
        if len(ends) == 1 or not all(map(math.isfinite, ends)) or ends != sorted(ends):
            raise ValueError(
                f"{self.key} has the interval {self.low} to {self.high}; give both ends, in order, or none"
            )

    @property
    def key(self) -> str:
        """The flat name: task/metric."""
        return f"{self.task}/{self.metric}"

    @property
    def protocol_hash(self) -> str:
        """Short sha256 of the protocol and the version: equal hashes were measured the same way."""
        text = json.dumps([self.version, self.protocol], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def shown(self, value: float | None = None) -> str:
        """`value` (the row's own by default) as it is printed; a dash where there is none."""
        value = self.value if value is None else value
        if value is None:
            return "–"
        if self.unit in ("%", "x100"):
            return f"{100 * value:.1f} {self.unit.removeprefix('x100')}".rstrip()
        if self.unit:
            return f"{value:.2f} {self.unit}"
        if abs(value) >= 10:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
        return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"

    def shown_interval(self) -> str:
        """The 95 % interval as it is printed, in the value's unit; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        low, high = (self.shown(end).removesuffix(f" {self.unit}") for end in (self.low, self.high))
        return f"[{low}, {high}]"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON."""
        return dataclasses.asdict(self) | {"protocol_hash": self.protocol_hash}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Score":
        """Inverse of `to_dict`."""
        return cls(**{key: value for key, value in row.items() if key != "protocol_hash"})


@dataclass(frozen=True)
class Measurement:
    """What the rows of one measurement share: the task's name, the seed, and the settings of its protocol."""

    task: str
    seed: int
    protocol: dict[str, Any] = field(default_factory=dict)

    def named(self, task: str) -> "Measurement":
        """The same for another task."""
        return dataclasses.replace(self, task=task)

    def with_protocol(self, **settings: Any) -> "Measurement":
        """The same with further settings."""
        return dataclasses.replace(self, protocol=self.protocol | settings)

    def score(self, metric: str, value: float | None, *, n: int, **fields: Any) -> Score:
        """A row of it."""
        return Score(task=self.task, metric=metric, value=value, n=n, seed=self.seed, protocol=self.protocol, **fields)

    def mean(self, metric: str, values: Sequence[float], **fields: Any) -> Score:
        """The row of the mean of one value per item, with its interval."""
        interval = bootstrap(values)
        return self.score(metric, float(np.mean(values)), n=len(values), **interval._asdict(), **fields)

    def missing(self, metric: str, *, note: str, **fields: Any) -> Score:
        """A row without a value, for the reason in `note`."""
        return self.score(metric, None, n=0, note=note, **fields)


def texts_sha256(texts: Sequence[str]) -> str:
    """Names a list of texts: scores over equal lists may be compared."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def write_scores(path: str | Path, scores: Iterable[Score], *, samples: Any = None, **more: Any) -> None:
    """Write `{"scores": [...], "samples": ..., **more}`.

    Raises:
        ValueError: two rows with the same key.
    """
    rows = list(scores)
    keys = [score.key for score in rows]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{path}: two rows are named {twice[0]}; a key belongs to one value")
    write_json(path, {"scores": [score.to_dict() for score in rows], "samples": samples, **more})


def read_scores(path: str | Path) -> list[Score]:
    """The rows of a file written by `write_scores`.

    Raises:
        UserError: no such file, or not one of ours.
    """
    content = read_json(path)
    try:
        return [Score.from_dict(row) for row in content["scores"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no scores ({error}); delete it and run the evaluation again") from None
