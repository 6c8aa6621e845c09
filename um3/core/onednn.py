"""Float32 products on a CPU by oneDNN.

torch gives them to MKL, which has no AVX-512 kernels for AMD's processors: there oneDNN is twice as fast, elsewhere
equally fast (benchmarks/). Products that need a gradient have to bring their own: this one has none.

Shapes: R entries of the weight, D inputs.
"""

import torch
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKED_FOR_ROWS = 16
"""Rows of x that `pack` has in mind; others are as right, and about as fast."""


def serves(x: Tensor, weight_RD: Tensor) -> bool:
    """Whether `linear` takes these."""
    return AVAILABLE and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in (x, weight_RD))


def linear(x: Tensor, weight_RD: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """x (..., D) -> x W^T + b (..., R), without gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_RD, bias_R, "none", [], "")
    return product


def pack(weight_RD: Tensor) -> Tensor:
    """A copy of `weight_RD` as oneDNN wants it in memory, for `linear` alone.

    For few rows of x, where reading the weight is all the work, it is up to twice as fast: it reads at the memory's
    speed (benchmarks/).
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_RD.contiguous(), PACKED_FOR_ROWS)
    return packed
