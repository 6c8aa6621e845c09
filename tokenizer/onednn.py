"""Float32 matrix products on a CPU with oneDNN, without gradient.

torch uses MKL for them, which has no AVX-512 kernels for AMD's processors: there oneDNN is twice as fast, elsewhere
as fast (benchmarks/). Shapes: R rows of the weight, D inputs.
"""

import torch
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKED_FOR_ROWS = 16
"""Rows of x that the layout of `pack` is tuned for; other numbers of rows give the same result at about that speed."""


def serves(x: Tensor, weight_RD: Tensor) -> bool:
    """Whether `linear` supports these tensors."""
    return AVAILABLE and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in (x, weight_RD))


def linear(x: Tensor, weight_RD: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """x (..., D) -> x W^T + b (..., R), without gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_RD, bias_R, "none", [], "")
    return product


def pack(weight_RD: Tensor) -> Tensor:
    """A copy of `weight_RD` in oneDNN's memory layout, for `linear` only.

    For few rows of x, when reading the weight dominates, it is up to twice as fast (benchmarks/).
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_RD.contiguous(), PACKED_FOR_ROWS)
    return packed
