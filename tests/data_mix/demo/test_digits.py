"""Digits: a fixed stratified split, smooth images that show their class."""

from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from data_mix.demo.digits import DigitsSource
from data_mix.demo.scenes import BACKGROUND


def test_the_split_is_fixed_disjoint_and_stratified() -> None:
    train, val = DigitsSource(size=16, split="train"), DigitsSource(size=16, split="val")
    assert (len(train), len(val)) == (1438, 359)
    assert set(train.rows) | set(val.rows) == set(range(1797))
    assert set(Counter(val.labels).values()) <= set(range(34, 38))
    with pytest.raises(IndexError):
        val[359]
    with pytest.raises(ValueError, match="size=4"):
        DigitsSource(size=4, split="val")
    assert list(val.rows[:5]) == [2, 8, 12, 27, 37]  # golden


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_digit_is_dark_ink_on_the_background(size: int) -> None:
    source = DigitsSource(size=size, split="train")
    sample = source[0]
    assert sample.image_HWC.shape == (size, size, 3) and sample.image_HWC.dtype == np.uint8
    assert tuple(sample.image_HWC[0, 0]) == BACKGROUND
    assert sample.image_HWC.min() < 60
    name = source.class_names[source.labels[0]]
    assert sample.captions[0] == f"a handwritten {name}" and len(set(sample.captions)) == 3
    assert source[0].key == sample.key != source[1].key


def test_classes_can_be_read_from_the_pixels() -> None:
    train, val = DigitsSource(size=16, split="train"), DigitsSource(size=16, split="val")
    x_train = np.stack([train[i].image_HWC[::2, ::2, 0].ravel() for i in range(600)]) / 255
    x_val = np.stack([val[i].image_HWC[::2, ::2, 0].ravel() for i in range(len(val))]) / 255
    probe = LogisticRegression(max_iter=200).fit(x_train, train.labels[:600])
    assert probe.score(x_val, val.labels) > 0.85
