"""Float32 products on a CPU by oneDNN.

torch gives them to MKL, which has no AVX-512 kernels for AMD's processors: there oneDNN is twice as fast, elsewhere
equally fast (benchmarks/). Products that need a gradient have to bring their own: this one has none.

Shapes: R entries of the weight, D inputs.
"""

import torch
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(x: Tensor, weight_RD: Tensor) -> bool:
    """Whether `linear` takes these."""
    return AVAILABLE and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in (x, weight_RD))


def linear(x: Tensor, weight_RD: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """x (..., D) -> x W^T + b (..., R), without gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_RD, bias_R, "none", [], "")
    return product
