"""Batches of coded images with captions: exact shares, the same samples on any number of ranks, captions, dropout."""

from collections import Counter

import pytest
import torch

from data_mix.batches.code_batches import CodeBatches
from data_mix.batches.config import CodeDataConfig
from tests.helpers.code_shards import write_codes
from um3.core.errors import UserError

FINGERPRINT = "f" * 64


@pytest.fixture
def codes(tmp_path):
    write_codes(tmp_path, source="scenes", num_images=40)
    write_codes(tmp_path, source="digits", num_images=10, captions=lambda row: [f"digit {row}"])
    return tmp_path


def batches(codes, *, rank=0, world_size=1, **options):
    config = CodeDataConfig(codes=str(codes), **options)
    return CodeBatches(config, batch_size=8, seed=1, fingerprint=FINGERPRINT, rank=rank, world_size=world_size)


def test_sources_have_exact_shares_by_size_or_weight(codes):
    for weights, expected in (({}, 0.2), ({"scenes": 1.0, "digits": 3.0}, 0.75), ({"digits": 1.0}, 1.0)):
        rows = batches(codes, image_weights=weights)
        seen = Counter(source for step in range(25) for source in rows.batch(step).sources)
        assert seen.total() == 200 and abs(seen["digits"] - 200 * expected) < 1


def test_the_ranks_share_the_batch_of_one(codes):
    whole = batches(codes, caption_dropout=0.5).batch(7)
    parts = [batches(codes, caption_dropout=0.5, rank=rank, world_size=2).batch(7) for rank in range(2)]
    assert torch.equal(torch.cat([part.codes_BN for part in parts]), whole.codes_BN)
    assert torch.equal(torch.cat([part.dropped_B for part in parts]), whole.dropped_B)
    assert [text for part in parts for text in part.captions] == whole.captions


def test_captions_and_dropout(codes):
    for choice, expected in (("first", {"caption"}), ("random", {"caption", "short"})):
        texts = [text for step in range(20) for text in batches(codes, caption=choice).batch(step).captions]
        assert {text.split()[0] for text in texts if not text.startswith("digit")} == expected
    dropped = torch.cat([batches(codes, caption_dropout=0.25).batch(step).dropped_B for step in range(100)])
    assert 0.19 < dropped.float().mean() < 0.31
    assert not batches(codes, caption_dropout=0.0).batch(0).dropped_B.any()


def test_the_state_names_other_data(codes):
    rows = batches(codes)
    rows.check_state(rows.state(5))
    with pytest.raises(UserError, match="draws"):
        batches(codes, image_weights={"scenes": 1.0, "digits": 1.0}).check_state(rows.state(5))
    with pytest.raises(UserError, match="photos"):
        batches(codes, image_weights={"photos": 1.0})
    with pytest.raises(UserError, match="fingerprint"):
        CodeBatches(CodeDataConfig(codes=str(codes)), batch_size=8, seed=1, fingerprint="other")


def test_images_without_captions_are_refused(codes):
    write_codes(codes, source="bare", num_images=20, captions=lambda row: [""])
    with pytest.raises(UserError, match=r"bare-.* has no caption; name .* data\.image_weights"):
        batches(codes).batch(0)
    assert all(batches(codes, image_weights={"scenes": 1.0}).batch(0).captions)
