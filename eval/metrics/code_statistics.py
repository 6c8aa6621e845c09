"""What the bits of a code carry: how often each is set, how they hang together, what flipping one does to a picture.

Shapes: B images, N patches, M = B * N codes, L bits (most significant first), H, W pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.scores import Measurement, Score
from tokenizer.bits import codes_to_bits

MAX_IMAGES = 1000
FLIPPED_IMAGES = 16
SATURATED = 0.01
"""A bit that is 0, or 1, in less than this share of the codes says next to nothing."""


class BitReport(NamedTuple):
    """`ones_L`: share of codes with the bit set. `entropy_L`: of a bit, in bits. `correlation_LL`: Pearson's, zero for
    a bit that never changes. `flip_L`: mean change in grey levels (0 to 255) of a picture with the bit flipped in every
    patch. `flipped_KHWC`: the first picture, then the same with each bit flipped, uint8 (1 + L, H, W, 3)."""

    ones_L: NDArray
    entropy_L: NDArray
    correlation_LL: NDArray
    flip_L: NDArray
    flipped_KHWC: NDArray
    num_codes: int
    num_distinct: int


def bit_report(codes_BN: Tensor, *, num_bits: int, draw: Callable[[Tensor], NDArray]) -> BitReport:
    """Measure codes (B, N) int64 of `num_bits`; `draw` turns codes into uint8 pictures (B, H, W, 3)."""
    bits_ML = codes_to_bits(codes_BN.flatten(), num_bits=num_bits).double()
    ones_L = bits_ML.mean(0)
    entropy_L = -(torch.xlogy(ones_L, ones_L) + torch.xlogy(1 - ones_L, 1 - ones_L)) / np.log(2)
    centred_ML = bits_ML - ones_L
    covariance_LL = centred_ML.T @ centred_ML / len(bits_ML)
    scale_L = covariance_LL.diagonal().sqrt()
    correlation_LL = torch.where(scale_L * scale_L[:, None] > 0, covariance_LL / (scale_L * scale_L[:, None]), 0.0)
    some_BN = codes_BN[:FLIPPED_IMAGES]
    plain = draw(some_BN)
    flips, pictures = [], [plain[0]]
    for bit in range(num_bits):
        flipped = draw(some_BN ^ (1 << (num_bits - 1 - bit)))
        flips.append(np.abs(flipped.astype(np.int16) - plain).mean())
        pictures.append(flipped[0])
    return BitReport(
        ones_L=ones_L.numpy(),
        entropy_L=entropy_L.numpy(),
        correlation_LL=correlation_LL.numpy(),
        flip_L=np.array(flips),
        flipped_KHWC=np.stack(pictures),
        num_codes=codes_BN.numel(),
        num_distinct=len(codes_BN.unique()),
    )


def bit_scores(report: BitReport, *, n: int, of: Measurement) -> list[Score]:
    """The report in four numbers; `n` images. The note of `saturated_bits` is an alarm, and names them."""
    num_bits = len(report.ones_L)
    apart_LL = np.abs(report.correlation_LL) * (1 - np.eye(num_bits))
    rare_L = np.minimum(report.ones_L, 1 - report.ones_L) < SATURATED
    named = ", ".join(str(bit) for bit in np.flatnonzero(rare_L))
    alarm = f"bits {named} (0 is the most significant) keep one value in over {1 - SATURATED:.0%} of the codes"
    possible = min(report.num_codes, 1 << num_bits)
    return [
        of.score("entropy", float(report.entropy_L.sum()), n=n, note=f"sum over {num_bits} bits of each bit's entropy"),
        of.score("saturated_bits", float(rare_L.sum()), n=n, higher_is_better=False, note=alarm if named else ""),
        of.score("correlation", float(apart_LL.max(initial=0.0)), n=n, higher_is_better=False,
                 note="largest between two bits, without its sign"),
        of.score("distinct_codes", report.num_distinct / possible, n=n, unit="%",
                 note=f"{report.num_distinct:,} of the {possible:,} that {report.num_codes:,} codes could be"),
    ]  # fmt: skip
