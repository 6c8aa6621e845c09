"""Which samples belong to train and which to val: by the names a data set gives its parts, else by hash."""

import hashlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from data_mix.samples import Split
from um3.core.errors import UserError

TRAIN_WORDS = frozenset({"train", "training"})
VAL_WORDS = frozenset({"val", "valid", "validation", "dev"})
TEST_WORDS = frozenset({"test", "testing"})
SPLIT_WORDS = TRAIN_WORDS | VAL_WORDS | TEST_WORDS
_HASH_RANGE = 2**64


def is_val(key: str, *, val_fraction: float) -> bool:
    """Whether hashing puts `key` into val: the same on every machine, and unmoved by whatever else is there."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * _HASH_RANGE


def check_val_fraction(val_fraction: float, *, name: str) -> None:
    """UserError unless it lies in [0, 1)."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"source '{name}': val_fraction={val_fraction} is outside [0, 1); 0.05 keeps 5 % for val")


def part_labels(available: Collection[str], *, split: Split, where: str) -> tuple[set[str], bool]:
    """The labels of a data set's own parts to read for `split`, and whether hashing must still divide them.

    Val is read from val, validation, valid or dev; failing those from test; failing that it is hashed out of
    train. A part with another name (extra, unlabeled) is never read.

    Raises:
        UserError: none of `available` is a part to read.
    """
    by_word = {label: label.strip().lower() for label in available}
    train = {label for label, word in by_word.items() if word in TRAIN_WORDS}
    val = {label for label, word in by_word.items() if word in VAL_WORDS}
    val = val or {label for label, word in by_word.items() if word in TEST_WORDS}
    if not train and (split == "train" or not val):
        raise UserError(f"{where}: no part is called train (found: {', '.join(sorted(available)) or 'none'})")
    if split == "train":
        return train, not val
    return (val, False) if val else (train, True)


def choose_rows(
    *,
    num_rows: int,
    labels: Sequence[str] | np.ndarray | None,
    key_of: Callable[[int], str],
    split: Split,
    val_fraction: float,
    where: str,
) -> np.ndarray:
    """The rows of `split`, ascending int64, by `labels` (one per row) if the data has them, else by hash of the key.

    Raises:
        UserError: the labels name no train part, or nothing is left for this split.
    """
    rows = np.arange(num_rows)
    by_hash = True
    if labels is not None:
        column = np.asarray(labels)
        wanted, by_hash = part_labels({str(label) for label in np.unique(column)}, split=split, where=where)
        rows = rows[np.isin(column, sorted(wanted))]
    if by_hash:
        in_val = np.fromiter((is_val(key_of(int(row)), val_fraction=val_fraction) for row in rows), dtype=bool)
        rows = rows[in_val == (split == "val")]
    if len(rows) == 0:
        remedy = "raise val_fraction or add data" if split == "val" and by_hash else "add data"
        raise UserError(f"{where}: nothing for the {split} split among {num_rows} samples; {remedy}")
    return rows
