"""Lay the samples of a batch into sequences: one in each, or as many as fit.

Packed or not, a batch holds the same samples: every rank packs its own ones last, by their lengths alone. Ranks may get
different numbers of sequences. That is harmless: the loss is a sum over the global count of targets, and the engine
only counts forward passes (`micro_batches`).

Shape legend: B = sequences of this rank, T = tokens of the longest of them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from um3.model.sequences import TrainingSequence


class PaddedSequences(NamedTuple):
    """Sequences padded on the right; target_mask_BT is true where the id is to be predicted."""

    input_ids_BT: Tensor
    target_mask_BT: Tensor


def first_fit(lengths: Sequence[int], *, seq_len: int) -> list[int]:
    """The sequence of each sample: the first with room for it, in the order of the samples."""
    room: list[int] = []
    numbers = []
    for length in lengths:
        number = next((number for number, free in enumerate(room) if free >= length), len(room))
        if number == len(room):
            room.append(seq_len)
        room[number] -= length
        numbers.append(number)
    return numbers


def lay_out(samples: Sequence[TrainingSequence], *, seq_len: int, packed: bool, pad_id: int) -> PaddedSequences:
    """The sequences that hold `samples` (of at most `seq_len` ids), as wide as the longest of them."""
    lengths = [len(sample.input_ids) for sample in samples]
    numbers = first_fit(lengths, seq_len=seq_len) if packed else list(range(len(samples)))
    rows: list[list[TrainingSequence]] = [[] for _ in range(max(numbers) + 1)]
    for number, sample in zip(numbers, samples, strict=True):
        rows[number].append(sample)
    ids, masks = zip(*([torch.cat(tensors) for tensors in zip(*row, strict=True)] for row in rows), strict=True)
    input_ids_BT = pad_sequence(list(ids), batch_first=True, padding_value=pad_id)
    return PaddedSequences(input_ids_BT, pad_sequence(list(masks), batch_first=True))


def micro_batches(
    input_ids_BT: Tensor, target_mask_BT: Tensor, *, parts: int, pad_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into `parts` parts of equal size, to within one sequence.

    DeepSpeed counts the parts, so every rank and step has the same number of them, and none is empty: sequences of
    padding without a target are added where there are fewer sequences than parts.
    """
    if (missing := parts - len(input_ids_BT)) > 0:
        input_ids_BT = F.pad(input_ids_BT, (0, 0, 0, missing), value=pad_id)
        target_mask_BT = F.pad(target_mask_BT, (0, 0, 0, missing))
    return zip(input_ids_BT.tensor_split(parts), target_mask_BT.tensor_split(parts), strict=True)
