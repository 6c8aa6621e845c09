"""Feature networks, and the resizing of images for Inception."""

import numpy as np
import pytest
import torch

from eval.metrics.features import INCEPTION_URL, inception_features, random_features
from eval.metrics.inception import PREPROCESSINGS, Inception2015, prepare
from um3.core.errors import UserError


def test_random_features_are_reproducible():
    first, second = random_features(), random_features()
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    assert first.extract(images).shape == (12, first.num_features)
    assert torch.equal(first.extract(images), second.extract(images))


def test_inception_has_the_published_layout():
    shapes = {name: tuple(tensor.shape) for name, tensor in Inception2015().state_dict().items()}
    assert len(shapes) == 566
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6c.branch7x7dbl_3.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["fc.weight"] == (1008, 2048)


def test_missing_or_other_weights_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=INCEPTION_URL):
        inception_features(str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth is not the published file .*6726825d"):
        inception_features(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="does not hold the Inception weights"):
        inception_features(str(tmp_path / "other.pth"), sha256="")
    (tmp_path / "damaged.pth").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        inception_features(str(tmp_path / "damaged.pth"), sha256="")


def test_a_plain_colour_keeps_its_value_in_every_preprocessing():
    plain = np.broadcast_to(np.array([0, 128, 255], dtype=np.uint8), (1, 20, 30, 3)).copy()
    for name in PREPROCESSINGS:
        levels = (-1, 128 / 127.5 - 1, 1) if name == "pytorch-fid" else (-1, 0, 127 / 128)
        expected = torch.tensor(levels)[None, :, None, None].expand(1, 3, 299, 299)
        torch.testing.assert_close(prepare(plain, preprocessing=name), expected, atol=1e-5, rtol=0)


def by_hand(image_HW, x, y, *, corners):
    """One bilinear value: between the corners of pixels (TensorFlow 1) or between their centres (torch)."""
    places = []
    for place, length in zip((y, x), image_HW.shape, strict=True):
        exact = max(place * length / 299 if corners else (place + 0.5) * length / 299 - 0.5, 0)
        lower = int(exact)
        places.append((min(lower, length - 1), min(lower + 1, length - 1), exact - lower))
    (top, bottom, down), (left, right, along) = places
    upper, lower = (image_HW[row, left] * (1 - along) + image_HW[row, right] * along for row in (top, bottom))
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize(("name", "corners"), [("pytorch-fid", False), ("torch-fidelity", True)])
@pytest.mark.parametrize("size", [(7, 11), (299, 299), (512, 400)])
def test_bilinear_preprocessings_by_hand(name, corners, size):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    prepared = prepare(image, preprocessing=name)
    middle, scale = (127.5, 127.5) if name == "pytorch-fid" else (128, 128)
    for x, y in ((0, 0), (298, 298), (150, 3), (17, 222)):
        values = np.array([by_hand(image[0, ..., c].astype(np.float64), x, y, corners=corners) for c in range(3)])
        np.testing.assert_allclose(prepared[0, :, y, x], (values - middle) / scale, atol=2e-4)


def test_clean_fid_is_antialiased():
    """A chequered image of 600 pixels is grey at 299 pixels; without antialiasing it has stripes."""
    board = np.indices((600, 600)).sum(axis=0) % 2 * 255
    images = np.repeat(board[None, ..., None], 3, axis=-1).astype(np.uint8)
    spread = {name: float(prepare(images, preprocessing=name).std()) for name in PREPROCESSINGS}
    assert spread["clean-fid"] < 0.02 < 0.1 < min(spread["pytorch-fid"], spread["torch-fidelity"])
