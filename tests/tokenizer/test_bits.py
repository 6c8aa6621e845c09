"""Codes, bits and sub-tokens survive every round trip, from 1 to 60 bits."""

import pytest
import torch

from tokenizer.bits import bits_to_codes, codes_to_bits, codes_to_subtokens, subtokens_to_codes


def test_codes_and_bits_round_trip():
    for num_bits in range(1, 61):
        codes = torch.randint(0, 2**num_bits, (4, 7), generator=torch.Generator().manual_seed(num_bits))
        codes[0, :2] = torch.tensor([0, 2**num_bits - 1])
        assert torch.equal(bits_to_codes(codes_to_bits(codes, num_bits=num_bits)), codes), num_bits


def test_high_bits_come_first():
    assert codes_to_bits(torch.tensor([[6]]), num_bits=4).tolist() == [[[0, 1, 1, 0]]]
    subtokens = codes_to_subtokens(torch.tensor([(5 << 14) | 9]), subtokens=2, bits_per_subtoken=14)
    assert subtokens.tolist() == [[5, 9]]


@pytest.mark.parametrize("codes", [torch.tensor([-1]), torch.tensor([16]), torch.tensor([1.0])])
def test_codes_out_of_range_are_refused(codes):
    with pytest.raises(ValueError, match="codes"):
        codes_to_bits(codes, num_bits=4)
    with pytest.raises(ValueError, match="sub-tokens"):
        subtokens_to_codes(codes[:, None], bits_per_subtoken=4)


def test_too_many_bits_are_refused():
    with pytest.raises(ValueError, match="63"):
        codes_to_bits(torch.tensor([0]), num_bits=63)
    with pytest.raises(ValueError, match="63"):
        bits_to_codes(torch.zeros(1, 63))
    with pytest.raises(ValueError, match="63"):
        subtokens_to_codes(torch.zeros(1, 9, dtype=torch.long), bits_per_subtoken=7)
