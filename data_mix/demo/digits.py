"""Real handwriting that every installation carries: the 1,797 digits bundled with scikit-learn.

They are the one set of real images with classes that needs no download, so the demo measures zero-shot and
linear-probe accuracy on them. Source: UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0), 8 x 8 ink maps.
"""

import numpy as np
from PIL import Image

from data_mix.demo.scenes import BACKGROUND
from data_mix.samples import Sample, Split
from um3.core.seeds import derive_seed

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = (25, 25, 35)
FULL_INK = 16.0  # the data set's darkest value
VAL_FRACTION = 0.2
SPLIT_SEED = 0  # fixed for good: numbers measured on the val part must stay comparable


class DigitsSource:
    """The digits of one split, dark ink on the ground of the scenes, (size, size, 3) uint8."""

    name = "digits"
    class_names = CLASS_NAMES

    def __init__(self, *, size: int, split: Split) -> None:
        if size < 8:
            raise ValueError(f"size={size}: digits need at least 8 pixels")
        from sklearn.datasets import load_digits

        bundle = load_digits()
        self.size = size
        self.rows = _rows_of(bundle.target, split=split)
        self.labels = [int(label) for label in bundle.target[self.rows]]
        self._ink_N88 = (bundle.images[self.rows] / FULL_INK).astype(np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"digit {index} of {len(self)}")
        name = CLASS_NAMES[self.labels[index]]
        image_HWC = _drawn(self._ink_N88[index], size=self.size)
        return Sample(key=f"digits-{self.rows[index]:04d}", image_HWC=image_HWC, captions=captions_of(name))


def _rows_of(labels: np.ndarray, *, split: Split) -> np.ndarray:
    """The rows of a split, ascending: of every class the same share, chosen by hash and so the same for ever."""
    chosen: list[int] = []
    for label in range(len(CLASS_NAMES)):
        rows = [int(row) for row in np.flatnonzero(labels == label)]
        rows.sort(key=lambda row: derive_seed(SPLIT_SEED, "digits", row))
        num_val = round(VAL_FRACTION * len(rows))
        chosen += rows[:num_val] if split == "val" else rows[num_val:]
    return np.sort(chosen)


def captions_of(class_name: str) -> tuple[str, ...]:
    """What is said of a digit called `class_name`; also the prompts of the zero-shot test."""
    return (f"a handwritten {class_name}", f"the digit {class_name}", f"the number {class_name} in ink")


def _drawn(ink_88: np.ndarray, *, size: int) -> np.ndarray:
    """An 8 x 8 ink map in [0, 1], enlarged smoothly and laid on the ground."""
    # A frame of one blank cell: the strokes reach the border of the map and would end in a hard cut.
    framed = Image.fromarray(np.pad(ink_88, 1))
    enlarged = framed.resize((size, size), Image.Resampling.BICUBIC)
    coverage_HW1 = np.clip(np.asarray(enlarged), 0, 1)[:, :, None]
    ground, ink = np.array(BACKGROUND, dtype=np.float32), np.array(INK, dtype=np.float32)
    return np.rint(ground + coverage_HW1 * (ink - ground)).astype(np.uint8)
