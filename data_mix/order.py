"""Which sample is read when: a function of (seed, step), so no data state has to be saved.

A permutation per source and epoch, exact counts of every batch by error diffusion, and their even spread within it.
"""

import functools
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_mix.samples import BadSample, ReadT
from data_mix.sources.hub_streaming import hub_stream
from um3.core.errors import UserError
from um3.core.seeds import numpy_generator

logger = logging.getLogger(__name__)

# Shares are integers in units of 2^-40, so that sums over a whole run are exact. Rounding a share to this unit
# moves the count of its class by 0.004 samples after 8 billion samples (120,000 batches of 65,536).
SHARE_UNIT = 2**40


class SampleOrder:
    """The order of a source of `length` samples that is read repeatedly, with a new permutation for every epoch."""

    def __init__(self, length: int, *, seed: int, name: str) -> None:
        if length < 1:
            raise UserError(f"source '{name}' is empty; check its path, or remove it from the config")
        self.length, self.seed, self.name = length, seed, name
        self._bad: dict[int, str] = {}
        # Two epochs: a batch, or the one prepared in advance, may cross the border between them.
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def index(self, draw: int) -> int:
        """Index in the source of the `draw`-th sample ever taken from it."""
        epoch, position = divmod(draw, self.length)
        return int(self._permutation(epoch)[position])

    def substitutes(self, draw: int) -> Iterator[int]:
        """The sample of `draw`, then its substitutes if it cannot be used: the following ones of the epoch, each once.

        A substitute is also read at its own turn, so the sample of a draw never depends on what was read before it.
        """
        epoch_start = draw - draw % self.length
        for tries in range(self.length):
            yield self.index(epoch_start + (draw + tries) % self.length)

    def first_usable(self, draw: int, read: Callable[[int], ReadT], *, what: str) -> tuple[ReadT, list[str]]:
        """`read` of the first of `substitutes` for which it does not raise BadSample, and why it skipped others.

        A sample that cannot be used is read once only. UserError if none can be; it calls a sample `what`.
        """
        reasons: list[str] = []
        for index in self.substitutes(draw):
            if index not in self._bad:
                try:
                    return read(index), reasons
                except BadSample as error:
                    if error.reason not in self._bad.values():
                        logger.warning("%s: skipping %s %d and others like it: %s", self.name, what, index, error)
                    self._bad[index] = error.reason
            reasons.append(self._bad[index])
        counts = ", ".join(f"{reason} ({count})" for reason, count in Counter(self._bad.values()).most_common())
        raise UserError(f"none of the {self.length} {what}s of '{self.name}' can be used ({counts}); check its files")

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        kind = np.uint32 if self.length <= 2**32 else np.uint64
        order = np.arange(self.length, dtype=kind)
        numpy_generator(self.seed, "order", self.name, epoch).shuffle(order)  # `permutation` would copy it first
        return order


def each_index(source: Any, *, seed: int, name: str) -> Iterator[int]:
    """Every index of a source once: in an order drawn from the seed, or in ascending order for a streamed source."""
    order = SampleOrder(len(source), seed=seed, name=name)
    is_streamed = hub_stream(source) is not None
    return (draw if is_streamed else order.index(draw) for draw in range(order.length))


class ExactCounts:
    """The number of samples of each class in every batch, by error diffusion over the batches.

    After any number of batches, the samples of a class differ by less than one from the sum of its shares. This holds
    for any number of classes with fixed shares, and for up to three with changing ones: whole samples of a sum are
    given, begun ones may be, and those are given in the order in which they become whole (earliest deadline first,
    which finds an exact plan wherever there is one).
    """

    def __init__(self, shares: Callable[[int], tuple[int, ...]], *, batch_size: Callable[[int], int]) -> None:
        """Functions of the step: the share of each class, summing to SHARE_UNIT, and the samples to share out."""
        self.shares, self.batch_size = shares, batch_size
        self.num_classes = len(shares(0))
        self._sums = [0] * self.num_classes
        # Flat arrays: tuples would take 100 MB for 600,000 steps of three classes, each of these takes 14.
        self._given = array("q", self._sums)
        self._due = array("d", self._sums)

    def before(self, step: int) -> tuple[int, ...]:
        """Samples of each class in all batches before `step` (the first call takes about 3 us a step)."""
        while len(self._given) <= step * self.num_classes:
            self._add_step()
        return tuple(self._given[step * self.num_classes : (step + 1) * self.num_classes])

    def due(self, step: int) -> tuple[float, ...]:
        """Sum of the shares over all batches before `step`, in samples; `before` rounds it to whole samples."""
        self.before(step)
        return tuple(self._due[step * self.num_classes : (step + 1) * self.num_classes])

    def at(self, step: int) -> tuple[int, ...]:
        """Samples of each class in the batch of `step`."""
        return tuple(end - start for start, end in zip(self.before(step), self.before(step + 1), strict=True))

    def draws(self, step: int, positions: range | None = None) -> list[tuple[int, int]]:
        """(class, how many of it came before) of each sample of the batch of `step`, or of those at `positions` of it,
        with the classes evenly spread."""
        classes = interleave(self.at(step))
        start, stop = (positions.start, positions.stop) if positions is not None else (0, len(classes))
        numbers = (np.bincount(classes[:start], minlength=self.num_classes) + self.before(step)).tolist()
        samples = []
        for i in classes[start:stop].tolist():
            samples.append((i, numbers[i]))
            numbers[i] += 1
        return samples

    def _add_step(self) -> None:
        step = len(self._given) // self.num_classes - 1
        before = self.before(step)
        shares, num_samples = self.shares(step), self.batch_size(step)
        for i, share in enumerate(shares):
            self._sums[i] += share * num_samples
        given = [max(total // SHARE_UNIT, count) for total, count in zip(self._sums, before, strict=True)]
        missing = sum(before) + num_samples - sum(given)
        if missing:
            begun = [i for i, total in enumerate(self._sums) if given[i] * SHARE_UNIT < total]
            deadline = {i: ((given[i] + 1) * SHARE_UNIT - self._sums[i]) / max(shares[i], 1e-9) for i in begun}
            for i in sorted(begun, key=deadline.__getitem__)[:missing]:
                given[i] += 1
        self._given.extend(given)
        self._due.extend(total / SHARE_UNIT for total in self._sums)


def fixed_shares(weights: Sequence[float], *, of: str = "") -> tuple[int, ...]:
    """`weights` (of the sources `of`) scaled to sum to SHARE_UNIT; UserError for an invalid one, or none above zero."""
    if not weights or not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        where = of and f" of {of}"
        raise UserError(f"weights {list(weights)}{where}: all must be finite and at least 0, and one above 0")
    shares = [round(weight / sum(weights) * SHARE_UNIT) for weight in weights]
    # The rounding error goes to the largest.
    shares[shares.index(max(shares))] += SHARE_UNIT - sum(shares)
    return tuple(shares)


def fixed_counts(weights: Sequence[float], *, batch_size: int, of: str = "") -> ExactCounts:
    """`ExactCounts` of batches of one size whose shares are always `fixed_shares`; raises as that does."""
    shares = fixed_shares(weights, of=of)
    return ExactCounts(lambda _: shares, batch_size=lambda _: batch_size)


def interleave(counts: Sequence[int]) -> np.ndarray:
    """The class of each sample of a batch. Every class is spread evenly, so any slice has about the same mix."""
    places = [np.arange(1, 2 * count, 2) / count for count in counts if count]
    order = np.argsort(np.concatenate(places), kind="stable") if places else np.array([], dtype=int)
    return np.repeat(np.arange(len(counts)), counts)[order]


def of_class(number: int, classes: np.ndarray, positions: range) -> range:
    """Which samples of class `number`, counted among themselves, lie at `positions` of a batch's `classes`."""
    return range(*(int((classes[:end] == number).sum()) for end in (positions.start, positions.stop)))


def rank_positions(batch_size: int, *, rank: int, world_size: int) -> range:
    """The positions of a global batch that belong to `rank`; UserError if it does not divide among the ranks."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size={batch_size} does not divide among {world_size} processes; use a multiple of it")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def check_state(state: Mapping[str, Any], *, expected: Mapping[str, Any], keys: Sequence[str]) -> None:
    """UserError if a checkpoint's data `state` differs in one of `keys` from what this run expects at the same step."""
    for key in keys:
        old, new = state.get(key), expected[key]
        if old != new:
            if isinstance(old, dict) and old.keys() == new.keys():
                name = next(name for name in new if old[name] != new[name])
                key, old, new = f"{key} of {name}", old[name], new[name]
            raise UserError(
                f"the checkpoint of step {state['step']} was trained on other data: {key} {old}, now {new}; resume "
                "with the config and data of the checkpoint, or start a new run folder"
            )
