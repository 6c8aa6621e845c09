"""How the samples of a batch lie in its rows: one in each, or side by side as long as they fit.

Packed or not, a batch holds the same samples, so nothing about the ratio, the order or the state changes: packing
comes last, on each rank for itself, and is a function of the samples' lengths alone. Ranks may come out with different
numbers of rows; nothing needs them to be equal, since the loss is a sum over the global count of targets and the
engine only counts forward passes (`micro_batches`).

Shape legend: S = samples of this rank, B = its rows, T = ids of the longest row.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from um3.core.errors import UserError
from um3.model.sequences import Row


class Rows(NamedTuple):
    """Rows padded on the right.

    target_mask_BT: true where the id is to be predicted. row_S, start_S and lengths_S: where each sample lies.
    """

    input_ids_BT: Tensor
    target_mask_BT: Tensor
    row_S: Tensor
    start_S: Tensor
    lengths_S: Tensor


def first_fit(lengths: Sequence[int], *, seq_len: int) -> list[int]:
    """The row of each sample: the first with room for it, in the order of the samples."""
    room: list[int] = []
    rows = []
    for length in lengths:
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(seq_len)
        room[row] -= length
        rows.append(row)
    return rows


def lay_out(samples: Sequence[Row], *, seq_len: int, packed: bool, pad_id: int) -> Rows:
    """The rows that hold `samples`, as wide as the longest of them.

    Raises:
        UserError: a sample longer than `seq_len`.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    if max(lengths) > seq_len:
        raise UserError(f"a sample of {max(lengths)} ids is longer than a row of {seq_len}; raise data.seq_len")
    rows = first_fit(lengths, seq_len=seq_len) if packed else list(range(len(samples)))
    used = [0] * (max(rows) + 1)
    starts = []
    for row, length in zip(rows, lengths, strict=True):
        starts.append(used[row])
        used[row] += length
    input_ids_BT = torch.full((len(used), max(used)), pad_id, dtype=torch.int64)
    target_mask_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for sample, row, start, length in zip(samples, rows, starts, lengths, strict=True):
        input_ids_BT[row, start : start + length] = sample.input_ids
        target_mask_BT[row, start : start + length] = sample.targets
    return Rows(input_ids_BT, target_mask_BT, torch.tensor(rows), torch.tensor(starts), torch.tensor(lengths))


def micro_batches(
    input_ids_BT: Tensor, target_mask_BT: Tensor, *, parts: int, pad_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`input_ids_BT` and `target_mask_BT` in `parts` equal parts, or as equal as packed rows divide.

    DeepSpeed counts the parts, which every rank and step has alike, and never what is in them. None is empty: where
    there are fewer rows than parts, rows of padding without a target make them up.
    """
    if (missing := parts - len(input_ids_BT)) > 0:
        input_ids_BT = F.pad(input_ids_BT, (0, 0, 0, missing), value=pad_id)
        target_mask_BT = F.pad(target_mask_BT, (0, 0, 0, missing))
    return zip(input_ids_BT.tensor_split(parts), target_mask_BT.tensor_split(parts), strict=True)
