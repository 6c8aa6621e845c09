"""PNG files, contact sheets and code images."""

import numpy as np
import pytest
import torch

from um3.inference.image_io import MARGIN, code_image, contact_sheet, enlarge


def test_small_images_are_enlarged_in_whole_pixels_and_large_ones_unchanged():
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    big = enlarge(small)
    assert big.size == (32 * 11, 24 * 11)
    assert np.array_equal(np.asarray(big)[5::11, 5::11], small)
    assert enlarge(np.zeros((200, 300, 3), dtype=np.uint8)).size == (384, 256)
    assert enlarge(np.zeros((400, 300, 3), dtype=np.uint8)).size == (300, 400)


def test_a_sheet_has_every_image_in_reading_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90), (1, 2, 3)]
    images = [np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours]
    sheet = contact_sheet(images, columns=3)
    assert sheet.size == (3 * (256 + MARGIN) + MARGIN, 2 * (256 + MARGIN) + MARGIN)
    for index, colour in enumerate(colours):
        centre = [MARGIN + place * (256 + MARGIN) + 128 for place in (index % 3, index // 3)]
        assert sheet.getpixel((centre[0], centre[1])) == colour
    labelled = contact_sheet(images, columns=3, labels=["a long label that has to be wrapped " * 4] * 5)
    assert labelled.height > sheet.height and labelled.width == sheet.width
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_codes_become_colours():
    codes = torch.tensor([0, 2**28 - 1, (2**9 - 1) << 19, 0])
    image = code_image(codes, num_bits=28)
    assert image.shape == (2, 2, 3) and image.dtype == np.uint8
    assert image.reshape(4, 3).tolist() == [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="do not form a square"):
        code_image(codes[:3], num_bits=28)
