"""Handwriting that every installation carries: the 1,797 digits bundled with scikit-learn.

They are the only real images with classes that need no download, so the demo measures zero-shot and linear-probe
accuracy on them. Source: UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0), 8 x 8 maps of ink.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from data_mix.demo.scenes import blend
from data_mix.samples import Sample, Split
from um3.core.seeds import derive_seed

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = (25, 25, 35)
FULL_INK = 16.0  # the data set's darkest value
VAL_FRACTION = 0.2
SPLIT_SEED = 0  # never change it: numbers measured on the val split must stay comparable


class DigitsSource:
    """The digits of one split, dark ink on the background of the scenes, uint8 (size, size, 3)."""

    name = "digits"
    fingerprint: Callable[[], str]
    class_names = CLASS_NAMES

    def __init__(self, *, size: int, split: Split) -> None:
        if size < 8:
            raise ValueError(f"size={size}: digits need at least 8 pixels")
        from sklearn.datasets import load_digits

        bundle = load_digits()
        self.size = size
        self.rows = _split_rows(bundle.target, split=split)
        self.labels = [int(label) for label in bundle.target[self.rows]]
        self._ink_N88 = (bundle.images[self.rows] / FULL_INK).astype(np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        # One blank cell on each side: the strokes reach the border of the map and would end in a hard cut.
        ink = Image.fromarray(np.pad(self._ink_N88[index], 1))
        enlarged = ink.resize((self.size, self.size), Image.Resampling.BICUBIC)
        image_HWC = blend(np.clip(np.asarray(enlarged), 0, 1), ink=INK)
        return Sample(self.key(index), image_HWC, captions_of(CLASS_NAMES[self.labels[index]]))

    def key(self, index: int) -> str:
        """The key of digit `index`."""
        return f"digits-{self.rows[index]:04d}"


def _split_rows(labels: np.ndarray, *, split: Split) -> np.ndarray:
    """The rows of a split, ascending: the same share of every class, chosen by hash."""
    chosen: list[int] = []
    for label in range(len(CLASS_NAMES)):
        rows = [int(row) for row in np.flatnonzero(labels == label)]
        rows.sort(key=lambda row: derive_seed(SPLIT_SEED, "digits", row))
        num_val = round(VAL_FRACTION * len(rows))
        chosen += rows[:num_val] if split == "val" else rows[num_val:]
    return np.sort(chosen)


def captions_of(class_name: str) -> tuple[str, ...]:
    """The captions of a digit called `class_name`, which are also the prompts of the zero-shot test."""
    return (f"a handwritten {class_name}", f"the digit {class_name}", f"the number {class_name} in ink")
