"""Feature networks, and the resizing of images for Inception."""

import numpy as np
import pytest
import torch
from scipy import ndimage

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


@pytest.mark.parametrize(("name", "offset"), [("pytorch-fid", 0.5), ("torch-fidelity", 0)])
@pytest.mark.parametrize("size", [(7, 11), (299, 299), (512, 400)])
def test_bilinear_preprocessings_are_scipys(name, offset, size):
    """Between the centres of pixels (torch) or between their corners (TensorFlow 1)."""
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    places = np.meshgrid(*((np.arange(299) + offset) * length / 299 - offset for length in size), indexing="ij")
    channels = [image[0, ..., channel].astype(np.float64) for channel in range(3)]
    values = np.stack([ndimage.map_coordinates(channel, places, order=1, mode="nearest") for channel in channels])
    middle = 127.5 if name == "pytorch-fid" else 128
    np.testing.assert_allclose(prepare(image, preprocessing=name)[0], (values - middle) / middle, atol=2e-4)


def test_clean_fid_is_antialiased():
    """A chequered image of 600 pixels is grey at 299 pixels; without antialiasing it has stripes."""
    board = np.indices((600, 600)).sum(axis=0) % 2 * 255
    images = np.repeat(board[None, ..., None], 3, axis=-1).astype(np.uint8)
    spread = {name: float(prepare(images, preprocessing=name).std()) for name in PREPROCESSINGS}
    assert spread["clean-fid"] < 0.02 < 0.1 < min(spread["pytorch-fid"], spread["torch-fidelity"])
