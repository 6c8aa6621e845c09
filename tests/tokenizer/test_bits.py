"""Codes, bits and sub-tokens survive every round trip, from 1 to 60 bits."""

import pytest
import torch

from tokenizer.bits import bits_to_codes, codes_to_bits, codes_to_subtokens, subtokens_to_codes


@pytest.mark.parametrize("num_bits", range(1, 61))
def test_codes_and_bits_round_trip(num_bits: int) -> None:
    codes = torch.randint(0, 2**num_bits, (4, 7), generator=torch.Generator().manual_seed(num_bits))
    codes[0, :2] = torch.tensor([0, 2**num_bits - 1])
    assert torch.equal(bits_to_codes(codes_to_bits(codes, num_bits=num_bits)), codes)


def test_bits_are_most_significant_first() -> None:
    assert codes_to_bits(torch.tensor([[6]]), num_bits=4).tolist() == [[[0, 1, 1, 0]]]


@pytest.mark.parametrize(("slots", "bits_per_slot"), [(2, 14), (4, 7), (1, 12), (28, 1), (4, 15)])
def test_subtokens_round_trip(slots: int, bits_per_slot: int) -> None:
    codes = torch.randint(0, 2 ** (slots * bits_per_slot), (3, 5), generator=torch.Generator().manual_seed(0))
    subtokens = codes_to_subtokens(codes, slots=slots, bits_per_slot=bits_per_slot)
    assert subtokens.shape == (3, 5, slots) and int(subtokens.max()) < 2**bits_per_slot
    assert torch.equal(subtokens_to_codes(subtokens, bits_per_slot=bits_per_slot), codes)


def test_slot_0_holds_the_high_bits() -> None:
    subtokens = codes_to_subtokens(torch.tensor([(5 << 14) | 9]), slots=2, bits_per_slot=14)
    assert subtokens.tolist() == [[5, 9]]


@pytest.mark.parametrize("codes", [torch.tensor([-1]), torch.tensor([16]), torch.tensor([1.0])])
def test_foreign_codes_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes"):
        codes_to_bits(codes, num_bits=4)


def test_too_many_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="63"):
        codes_to_bits(torch.tensor([0]), num_bits=63)
