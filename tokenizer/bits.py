"""Codes, bits and sub-tokens, all in int64 (a float32 sum of 28 bits loses about four codes in five).

Legend: B batch, N patches, L bits of a code, S sub-tokens of a code.
"""

import torch
from torch import Tensor

MAX_BITS = 62


def codes_to_bits(codes_BN: Tensor, *, num_bits: int) -> Tensor:
    """Codes (..., N) int64 -> bits (..., N, L) int64 of 0 and 1, most significant first."""
    return codes_to_subtokens(codes_BN, subtokens=num_bits, bits_per_subtoken=1)


def bits_to_codes(bits_BNL: Tensor) -> Tensor:
    """Bits (..., N, L) of 0 and 1 (or booleans), most significant first -> codes (..., N) int64."""
    _check_bits(bits_BNL.shape[-1])
    shifts_L = torch.arange(bits_BNL.shape[-1] - 1, -1, -1, device=bits_BNL.device)
    return (bits_BNL.long() << shifts_L).sum(-1)


def codes_to_subtokens(codes_BN: Tensor, *, subtokens: int, bits_per_subtoken: int) -> Tensor:
    """Codes (..., N) -> sub-tokens (..., N, S) of `bits_per_subtoken` bits; sub-token 0 holds the high bits."""
    _check_range(codes_BN, name="codes", num_bits=subtokens * bits_per_subtoken)
    shifts_S = torch.arange(subtokens - 1, -1, -1, device=codes_BN.device) * bits_per_subtoken
    return (codes_BN.long().unsqueeze(-1) >> shifts_S) & ((1 << bits_per_subtoken) - 1)


def subtokens_to_codes(subtokens_BNS: Tensor, *, bits_per_subtoken: int) -> Tensor:
    """Sub-tokens (..., N, S) -> codes (..., N) int64; the inverse of `codes_to_subtokens`."""
    _check_bits(subtokens_BNS.shape[-1] * bits_per_subtoken)
    _check_range(subtokens_BNS, name="sub-tokens", num_bits=bits_per_subtoken)
    shifts_S = torch.arange(subtokens_BNS.shape[-1] - 1, -1, -1, device=subtokens_BNS.device) * bits_per_subtoken
    return (subtokens_BNS.long() << shifts_S).sum(-1)


def _check_bits(num_bits: int) -> None:
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"codes of {num_bits} bits are not supported; use 1 to {MAX_BITS}")


def _check_range(values: Tensor, *, name: str, num_bits: int) -> None:
    _check_bits(num_bits)
    if values.is_floating_point():
        raise ValueError(f"{name} must be integers, not {values.dtype}")
    if values.numel() and not values.is_meta and bool(((values < 0) | (values >> num_bits > 0)).any()):
        raise ValueError(f"{name} outside 0..2^{num_bits}-1")
