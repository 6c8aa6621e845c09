"""The nearest training image of a generated one, found among code shards and by hand."""

import numpy as np
import pytest
import torch

from eval.scores import Measurement
from eval.tasks import nearest_training
from eval.tasks.nearest_training import nearest, nearest_rows, training_codes
from tests.helpers.code_shards import write_codes
from tokenizer.images import decode_codes, encode_images, open_external_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """The mean colours of 16 patches, 12 bits each; decoded images have their codes again."""
    return open_external_tokenizer("mean_colour:coarse", setting="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Codes of 30 training images in two shards."""
    folder = tmp_path_factory.mktemp("codes")
    for shard in (0, 1):
        header = {"bits": 12, "fingerprint": tokenizer.fingerprint, "num_shards": 2, "plan": "p"}
        write_codes(folder / "codes", shard=shard, num_images=15, **header)
    return folder


def test_the_nearest_image_has_the_most_equal_bits(folder, tokenizer, scenes, monkeypatch):
    training = training_codes(folder, source="scenes", tokenizer=tokenizer)
    codes_MN = training.codes_MN
    assert codes_MN.shape == (30, 16)
    monkeypatch.setattr(nearest_training, "CHUNK", 7)
    found = nearest(training, images=scenes[0][:9])
    for index, codes_N in enumerate(encode_images(tokenizer, scenes[0][:9]).numpy()):
        equal = [sum(12 - (int(a) ^ int(b)).bit_count() for a, b in zip(codes_N, row, strict=True)) for row in codes_MN]
        assert found.equal_Q[index] == pytest.approx(max(equal) / (16 * 12))
        expected = decode_codes(tokenizer, torch.from_numpy(codes_MN[[int(np.argmax(equal))]]))
        assert (found.images[index] == expected[0]).all()


def test_copies_of_training_images_are_told_from_real_images(folder, tokenizer, scenes):
    training = training_codes(folder, source="scenes", tokenizer=tokenizer)
    copies = decode_codes(tokenizer, torch.from_numpy(training.codes_MN[3:9]))
    of = Measurement("scenes_generation", 0)
    (copied, real), images = nearest_rows(training, images=copies, originals=scenes[0][:6], of=of)
    assert copied.value == 1 and real.value < 0.8 and (images == copies).all()
    assert copied.protocol["training_images"] == 30


def test_without_codes_of_this_tokenizer_there_is_nothing_to_compare(folder, tokenizer, tmp_path):
    other = open_external_tokenizer("mean_colour:named", setting="test")
    assert training_codes(tmp_path, source="scenes", tokenizer=tokenizer) is None
    assert training_codes(folder, source="digits", tokenizer=tokenizer) is None
    assert training_codes(folder, source="scenes", tokenizer=other) is None
