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
from typing import Any, Literal

from um3.core import provenance
from um3.core.errors import UserError
from um3.core.files import read_json, write_json

Unit = Literal["%", "x100", "dB", ""]


@functools.cache
def _commit() -> str:
    return provenance.commit()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured value. Shares (accuracies, BLEU, CIDEr, ...) are fractions; the units "%" and "x100" only
    say how to show them.

    `n` counts what was scored and `skipped` what was asked for and could not be scored; `protocol` holds every setting
    that two values must share to be comparable.

    Raises:
        ValueError: a value that is not finite, or no value and no note that says why.
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
    note: str = ""
    version: str = "1"
    commit: str = field(default_factory=_commit)

    def __post_init__(self) -> None:
        if self.value is None and not self.note:
            raise ValueError(f"{self.key} has no value and no note that says why")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.key} = {self.value} is no number to report; give None and a note")

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
