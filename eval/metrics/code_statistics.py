"""Statistics of the bits of a code: entropy, correlation, and the change in the image when a bit is flipped.

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
"""A bit is saturated if it is 0, or 1, in less than this share of the codes."""


class CodeStatistics(NamedTuple):
    """Statistics of the codes of a set of images.

    ones_L: share of the codes with the bit set. entropy_L: entropy of each bit, in bits. correlation_LL: Pearson's;
    zero for a bit that never changes. flip_L: mean change in grey levels (0 to 255) if the bit is flipped in every
    patch. flipped_KHWC: the first image, then the same image with each bit flipped, uint8 (1 + L, H, W, 3).
    """

    ones_L: NDArray
    entropy_L: NDArray
    correlation_LL: NDArray
    flip_L: NDArray
    flipped_KHWC: NDArray
    num_codes: int
    num_distinct: int


def code_statistics(codes_BN: Tensor, *, num_bits: int, decode: Callable[[Tensor], NDArray]) -> CodeStatistics:
    """Measure codes (B, N) int64 of `num_bits`; `decode` turns codes into uint8 images (B, H, W, 3)."""
    bits_ML = codes_to_bits(codes_BN.flatten(), num_bits=num_bits).double()
    ones_L = bits_ML.mean(0)
    entropy_L = -(torch.xlogy(ones_L, ones_L) + torch.xlogy(1 - ones_L, 1 - ones_L)) / np.log(2)
    centred_ML = bits_ML - ones_L
    covariance_LL = centred_ML.T @ centred_ML / len(bits_ML)
    scale_L = covariance_LL.diagonal().sqrt()
    correlation_LL = torch.where(scale_L * scale_L[:, None] > 0, covariance_LL / (scale_L * scale_L[:, None]), 0.0)
    first_BN = codes_BN[:FLIPPED_IMAGES]
    images_BHWC = decode(first_BN)
    changes, flipped_images = [], [images_BHWC[0]]
    for bit in range(num_bits):
        flipped_BHWC = decode(first_BN ^ (1 << (num_bits - 1 - bit)))
        changes.append(np.abs(flipped_BHWC.astype(np.int16) - images_BHWC).mean())
        flipped_images.append(flipped_BHWC[0])
    by_bit = ones_L.numpy(), entropy_L.numpy(), correlation_LL.numpy(), np.array(changes)
    return CodeStatistics(*by_bit, np.stack(flipped_images), codes_BN.numel(), len(codes_BN.unique()))


def code_scores(statistics: CodeStatistics, *, n: int, of: Measurement) -> list[Score]:
    """Four rows for `n` images. A note on `saturated_bits` is a warning and names the bits."""
    num_bits = len(statistics.ones_L)
    off_diagonal_LL = np.abs(statistics.correlation_LL) * (1 - np.eye(num_bits))
    saturated_L = np.minimum(statistics.ones_L, 1 - statistics.ones_L) < SATURATED
    names = ", ".join(str(bit) for bit in np.flatnonzero(saturated_L))
    warning = f"bits {names} (0 is the most significant) have one value in over {1 - SATURATED:.0%} of the codes"
    possible = min(statistics.num_codes, 1 << num_bits)
    entropy, largest = float(statistics.entropy_L.sum()), float(off_diagonal_LL.max(initial=0.0))
    distinct_note = f"{statistics.num_distinct:,} of at most {possible:,} in {statistics.num_codes:,} codes"
    return [
        of.score("entropy", entropy, n=n, note=f"sum of the entropies of {num_bits} bits"),
        of.score("saturated_bits", float(saturated_L.sum()), n=n, higher_is_better=False, note=names and warning),
        of.score("correlation", largest, n=n, higher_is_better=False, note="largest absolute value between two bits"),
        of.score("distinct_codes", statistics.num_distinct / possible, n=n, unit="%", note=distinct_note),
    ]
