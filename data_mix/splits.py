"""Which samples belong to train and which to val: by the split names of a data set, else by hash of the key."""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from data_mix.samples import Split
from data_mix.sources.config import SourceConfig
from um3.core.errors import UserError
from um3.core.text import printable, valid_text

logger = logging.getLogger(__name__)

TRAIN_WORDS = frozenset({"train", "training", "restval"})  # restval: of Karpathy's split of COCO
VAL_WORDS = frozenset({"val", "valid", "validation", "dev"})
TEST_WORDS = frozenset({"test", "testing"})
SPLIT_WORDS = TRAIN_WORDS | VAL_WORDS | TEST_WORDS


def split_labels(available: Collection[str], *, split: Split, where: str) -> tuple[set[str], bool]:
    """The labels of a data set's own splits to read for `split`, and whether they must still be divided by hash.

    Val is read from val, validation, valid or dev; without those from test; without that it is a part of train. A split
    with another name is never read, which is told. UserError if none of `available` fits.
    """
    by_word = {label: label.strip().lower() for label in available}
    train = {label for label, word in by_word.items() if word in TRAIN_WORDS}
    val = {label for label, word in by_word.items() if word in VAL_WORDS}
    val = val or {label for label, word in by_word.items() if word in TEST_WORDS}
    if not train and (split == "train" or not val):
        raise UserError(f"{where}: no split is called train (found: {', '.join(sorted(available)) or 'none'})")
    unread = sorted(label for label, word in by_word.items() if word not in SPLIT_WORDS)
    if unread and split == "train":
        names = [f"'{label}' ({available[label]})" if isinstance(available, Counter) else label for label in unread]
        logger.warning("%s: the samples of these splits are not read: %s", where, printable(", ".join(names)))
    return (val if split == "val" and val else train), not val


def choose_samples(
    config: SourceConfig, keys: Iterable[str], *, num_samples: int, split: Split, labels: Sequence[str] | None = None
) -> np.ndarray:
    """Numbers of the samples of `split`, ascending int64, by `labels` (of each) or hash of keys, without those that the
    config excludes. UserError if none is left, or if no sample has an excluded key."""
    is_chosen, by_hash = np.ones(num_samples, dtype=bool), True
    if excluded := set(getattr(config, "exclude", ())):
        keys = list(keys)
        names = list(map(valid_text, keys))  # as samples have them
        if unknown := sorted(excluded.difference(names)):
            raise UserError(f"{config.where}: exclude has '{unknown[0]}', which is the key of no sample; remove it")
        is_chosen = np.array([name not in excluded for name in names])
    if labels is not None:
        wanted, by_hash = split_labels(Counter(labels), split=split, where=config.where)
        is_chosen &= np.isin(np.asarray(labels), sorted(wanted))
    if by_hash and (config.val_fraction or split == "val"):
        # The hash of a key is the same on every machine and beside any other samples.
        digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
        in_val = (int.from_bytes(digest, "big") < config.val_fraction * 2**64 for digest in digests)
        is_chosen &= np.fromiter(in_val, dtype=bool, count=num_samples) == (split == "val")
    if not is_chosen.any():
        remedy = "raise val_fraction or add data" if split == "val" and by_hash else "add data"
        raise UserError(f"{config.where}: none of its {num_samples} samples is in the {split} split; {remedy}")
    return np.flatnonzero(is_chosen)
