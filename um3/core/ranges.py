"""Ranges of config values, written at the fields of config dataclasses and checked by `um3.core.config.load_config`.

    lr: PositiveFloat = 5e-4
    betas: Annotated[list[Decay], Range(2, 2)]    # the range of a list is that of its length

Every other number must be finite, and every integer lie within EXACT_BELOW.
"""

from math import inf
from typing import Annotated, NamedTuple

EXACT_BELOW = 2**53
"""Integers below it are exact in every reader of JSON; jq and JavaScript silently round larger ones."""


class Range(NamedTuple):
    """minimum <= value <= maximum and above < value < below; NaN and infinity are in no range."""

    minimum: float = -inf
    maximum: float = inf
    above: float = -inf
    below: float = inf

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        is_large = isinstance(value, int) and abs(value) >= EXACT_BELOW
        return self.minimum <= value <= self.maximum and self.above < value < self.below and not is_large

    def __str__(self) -> str:
        words = ("at least", "at most", "above", "below")
        parts = [f"{word} {limit:g}" for word, limit in zip(words, self, strict=True) if abs(limit) < inf]
        return " and ".join(parts if min(self.maximum, self.below) < inf else [*parts, "finite"])


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]
Size = Annotated[int, Range(1, 2**20)]
"""A dimension of a model."""
