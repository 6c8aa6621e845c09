"""Which sample is read when: everything is a function of (seed, step), so no state has to be saved.

Three small tools, shared by the tokenizer's batches and UM3's rows: a fixed permutation per source and epoch,
exact integer shares of every batch by error diffusion, and an even spread of the shares within a batch.
"""

import functools
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_mix.sources.hub_streaming import streamed_part
from um3.core.errors import UserError
from um3.core.seeds import numpy_generator

# Shares are integers in units of 2^-40, so that sums over a whole run are exact. Rounding a share to this unit
# moves the count of its class by 0.004 samples after 8 billion samples (120,000 batches of 65,536).
SHARE_UNIT = 2**40


class SampleOrder:
    """A source of `length` samples read over and over, each epoch in a permutation of its own."""

    def __init__(self, length: int, *, seed: int, name: str) -> None:
        if length < 1:
            raise UserError(f"source '{name}' is empty; point it at data or leave it out of the config")
        self.length, self.seed, self.name = length, seed, name
        # Two epochs: a batch, or the batch ahead of it, may lie across the border between them.
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def index(self, draw: int) -> int:
        """Index in the source of the `draw`-th sample ever taken from it."""
        epoch, position = divmod(draw, self.length)
        return int(self._permutation(epoch)[position])

    def substitutes(self, draw: int) -> Iterator[int]:
        """The sample of `draw`, then those to take instead if it cannot be used: the next of the same epoch, each once.

        A substitute also comes up at its own turn, so what a draw gives never depends on what was read before it.
        """
        epoch_start = draw - draw % self.length
        for tries in range(self.length):
            yield self.index(epoch_start + (draw + tries) % self.length)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        kind = np.uint32 if self.length <= 2**32 else np.uint64
        return numpy_generator(self.seed, "order", self.name, epoch).permutation(np.arange(self.length, dtype=kind))


def each_index(source: Any, *, seed: int, name: str) -> Iterator[int]:
    """Every index of a source once: in an order of the seed's, or as they come where it can only be read so (streamed).

    Raises:
        UserError: the source is empty.
    """
    order = SampleOrder(len(source), seed=seed, name=name)
    in_order = streamed_part(source) is not None
    return (draw if in_order else order.index(draw) for draw in range(order.length))


class ExactCounts:
    """How many rows of each class every batch holds, by error diffusion over the batches.

    After any number of batches the rows a class has had differ by less than one from the sum of its shares.
    That holds for any number of classes with fixed shares, and for up to three with changing ones: a row
    that is due must be given, one that is begun may be, and those that may be are given in the order in
    which they will become due (earliest deadline first, which finds an exact plan wherever there is one).
    """

    def __init__(self, shares: Callable[[int], tuple[int, ...]], *, batch_size: int | Callable[[int], int]) -> None:
        """`shares(step)` returns the share of each class in SHARE_UNITs, summing to SHARE_UNIT.

        `batch_size`: the rows to share out at every step, or a function from the step to them.
        """
        self.shares = shares
        self.batch_size = batch_size if callable(batch_size) else lambda step: batch_size
        self.num_classes = len(shares(0))
        self._asked = [0] * self.num_classes
        # Flat arrays: tuples would take 100 MB for 600,000 steps of three classes, each of these takes 14.
        self._given = array("q", self._asked)
        self._due = array("d", self._asked)

    def before(self, step: int) -> tuple[int, ...]:
        """Rows of each class in all batches before `step` (a loop of about 3 us a step the first time)."""
        while len(self._given) <= step * self.num_classes:
            self._give_next()
        return tuple(self._given[step * self.num_classes : (step + 1) * self.num_classes])

    def due(self, step: int) -> tuple[float, ...]:
        """What the shares of all batches before `step` add up to: the rows that `before` rounds to whole ones."""
        self.before(step)
        return tuple(self._due[step * self.num_classes : (step + 1) * self.num_classes])

    def at(self, step: int) -> tuple[int, ...]:
        """Rows of each class in the batch of `step`."""
        return tuple(end - start for start, end in zip(self.before(step), self.before(step + 1), strict=True))

    def _give_next(self) -> None:
        step = len(self._given) // self.num_classes - 1
        had = self.before(step)
        shares, num_rows = self.shares(step), self.batch_size(step)
        for i, share in enumerate(shares):
            self._asked[i] += share * num_rows
        given = [max(asked // SHARE_UNIT, before) for asked, before in zip(self._asked, had, strict=True)]
        missing = sum(had) + num_rows - sum(given)
        if missing:
            begun = [i for i, asked in enumerate(self._asked) if given[i] * SHARE_UNIT < asked]
            due = {i: ((given[i] + 1) * SHARE_UNIT - self._asked[i]) / max(shares[i], 1e-9) for i in begun}
            for i in sorted(begun, key=due.__getitem__)[:missing]:
                given[i] += 1
        self._given.extend(given)
        self._due.extend(asked / SHARE_UNIT for asked in self._asked)


def fixed_shares(weights: Sequence[float], *, of: str = "") -> tuple[int, ...]:
    """`weights` scaled to sum to SHARE_UNIT; what rounding leaves over goes to the largest. `of`: whose they are.

    Raises:
        UserError: a negative or non-finite weight, or none above zero.
    """
    if not weights or not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        raise UserError(
            f"weights {list(weights)}{of and f' of {of}'}: all must be finite and at least 0, and one above 0"
        )
    shares = [round(weight / sum(weights) * SHARE_UNIT) for weight in weights]
    shares[shares.index(max(shares))] += SHARE_UNIT - sum(shares)
    return tuple(shares)


def interleave(counts: Sequence[int]) -> list[int]:
    """Class of each row of a batch, every class spread evenly, so that any slice has about the same mix."""
    places = [((2 * j + 1) / count, i) for i, count in enumerate(counts) for j in range(count)]
    return [i for _, i in sorted(places)]


def shared_rows(batch_size: int, *, rank: int, world_size: int) -> range:
    """Rows of a global batch that belong to `rank`.

    Raises:
        UserError: the batch does not divide among the ranks.
    """
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size={batch_size} does not divide among {world_size} processes; use a multiple of it")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)
