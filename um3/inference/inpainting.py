"""Which patches of an image are sampled anew. Shapes: N patches of an image in reading order."""

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from um3.core.errors import UserError

Region = tuple[float, float, float, float] | np.ndarray
"""(left, top, right, bottom) as shares of the image, or a bool array over the square grid of patches."""


def region_patches(region: Region, *, num_patches: int) -> Tensor:
    """bool (N,): true for the patches of a region, which must have some. A box includes every patch it overlaps."""
    side = math.isqrt(num_patches)
    if isinstance(region, np.ndarray):
        if region.shape != (side, side) or region.dtype != np.bool_:
            raise UserError(f"the region is {region.dtype} {region.shape}; it must be bool ({side}, {side})")
        free_HW = torch.from_numpy(region.copy())
    else:
        box = tuple(region)
        if len(box) != 4 or not all(isinstance(edge, Real) for edge in box):
            raise UserError(f"the box {region} must be four numbers: left, top, right and bottom")
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"the box {region} must be (left, top, right, bottom) as shares of the image, 0 to 1")
        free_HW = torch.zeros(side, side, dtype=torch.bool)
        free_HW[_overlap(top, bottom, side=side), _overlap(left, right, side=side)] = True
    if not free_HW.any():
        raise UserError("the region contains no patch; mark at least one")
    return free_HW.flatten()


def _overlap(start: float, end: float, *, side: int) -> slice:
    # Rounded, so that 1/3 of 3 patches is exactly one patch.
    return slice(math.floor(round(start * side, 6)), math.ceil(round(end * side, 6)))
