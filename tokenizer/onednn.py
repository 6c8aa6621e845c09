"""Float32 matrix products on a CPU with oneDNN, without gradient.

torch uses MKL for them, which multiplies with AVX2 on AMD's processors. There oneDNN is as fast or faster: 1.0 to 1.1
times with AVX2, 1.1 on Zen 4, twice on Zen 5; on an Intel Xeon it is slower (benchmarks/). The maker decides, not a
measurement at start-up: the libraries round differently, and all ranks and runs must get the same bits. Shapes: R
rows of the weight, D inputs.
"""

import os
import platform
from pathlib import Path

import torch
from torch import Tensor

CHOICE = os.environ.get("UM3_ONEDNN", "")
"""0 leaves all products to torch, 1 sends them to oneDNN on every processor; otherwise the maker decides."""
AVAILABLE = CHOICE != "0" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CPUINFO = Path("/proc/cpuinfo")
PACKED_FOR_ROWS = 16
"""Rows of x that the layout of `pack` is tuned for; other numbers of rows give the same result at about that speed."""


def is_faster(processor: str) -> bool:
    """Whether oneDNN replaces MKL on the processor that this text describes: on those of AMD and its licensee Hygon."""
    return "AuthenticAMD" in processor or "HygonGenuine" in processor


IS_FASTER = CHOICE == "1" or is_faster(CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


def supports(x: Tensor, weight_RD: Tensor) -> bool:
    """Whether `linear` can multiply these tensors."""
    return AVAILABLE and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in (x, weight_RD))


def serves(x: Tensor, weight_RD: Tensor) -> bool:
    """Whether `linear` can multiply these tensors and is the faster way on this processor, for many rows of x."""
    return IS_FASTER and supports(x, weight_RD)


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
