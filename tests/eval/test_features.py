import numpy as np
import pytest
import torch

from eval.features import INCEPTION_URL, inception_features, random_features
from eval.frechet import frechet_distance
from eval.inception import Inception2015
from um3.core.errors import UserError


def pictures(*, count=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def test_random_features_are_the_same_every_time_and_tell_images_apart():
    first, second = random_features(), random_features()
    images = pictures()
    assert first.extract(images).shape == (12, first.num_features)
    assert torch.equal(first.extract(images), second.extract(images))
    assert not torch.equal(random_features(seed=1).extract(images), first.extract(images))
    same = frechet_distance(first.moments(images), first.moments(images, batch_size=5))
    other = frechet_distance(first.moments(images), first.moments(images // 2))
    assert same == pytest.approx(0, abs=1e-6) and other > 1e-3


def test_inception_has_the_published_layout():
    shapes = {name: tuple(tensor.shape) for name, tensor in Inception2015().state_dict().items()}
    assert len(shapes) == 566
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6c.branch7x7dbl_3.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["fc.weight"] == (1008, 2048)


def test_inception_loads_its_weights(tmp_path):
    torch.manual_seed(0)
    torch.save(Inception2015().state_dict(), tmp_path / "weights.pth")
    network = inception_features(str(tmp_path / "weights.pth"))
    features = network.extract(pictures(count=2))
    assert features.shape == (2, 2048) and torch.isfinite(features).all()
    assert network.name == "inception-2015"


def test_missing_or_foreign_weights_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=INCEPTION_URL):
        inception_features(str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the Inception weights"):
        inception_features(str(tmp_path / "other.pth"))
    (tmp_path / "damaged.pth").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        inception_features(str(tmp_path / "damaged.pth"))
