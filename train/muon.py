"""Muon: orthogonalised momentum for each weight matrix of the layers, AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update scale of Liu et al. (arXiv:2502.16982) so
that one learning rate and weight decay serve both parts.

Legend: M matrices of one shape, R rows, C columns.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from um3.core.distributed import gather_flat, rank

# Not torch.optim.Muon (torch 2.13): it refuses ZeRO's flat partitions, and in bf16 its first update differs by 1.3 %.
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic polynomial that maps singular values in (0, 1] to about 1 in five iterations."""
RMS_LIKE_ADAMW = 0.2
"""Root mean square of an update at learning rate 1, close to AdamW's (arXiv:2502.16982, section 2.2)."""


class Muon(torch.optim.AdamW):
    """Parameter groups with "shapes" hold matrices of these shapes and take Muon steps; other groups take AdamW steps.

    Under ZeRO 1 and 2 a group with shapes is this rank's part of its concatenated matrices. The momentum stays
    partitioned; the directions are gathered, and each rank orthogonalises the matrices that overlap its part.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "shapes" not in group]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if "shapes" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.state[param]["step"] = torch.zeros(())
                self.state[param]["exp_avg"] = torch.zeros_like(param)
            self.state[param]["step"] += 1
        gradients, momenta = [param.grad for param in params], [self.state[param]["exp_avg"] for param in params]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov
        if params[0].ndim == 2:
            updates = orthogonalise_all(directions)
        else:
            updates = [_of_partition(directions[0], shapes=group["shapes"])]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def _of_partition(part: Tensor, *, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The update of this rank's part of the matrices of `shapes`, concatenated, padded and partitioned evenly."""
    first, last = rank() * len(part), (rank() + 1) * len(part)
    flat = gather_flat(part)
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    overlapping = [
        (start, shape)
        for start, shape in zip(starts, shapes, strict=False)
        if start < last and start + math.prod(shape) > first
    ]
    matrices = [flat[start : start + math.prod(shape)].view(shape) for start, shape in overlapping]
    flat_update = torch.zeros_like(flat)
    for (start, shape), update_RC in zip(overlapping, orthogonalise_all(matrices), strict=True):
        flat_update[start : start + math.prod(shape)] = update_RC.flatten()
    return flat_update[first:last]


def orthogonalise_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The scaled update of each direction (R, C): its singular values set near 1. Equal shapes are batched."""
    indices: dict[tuple[int, int], list[int]] = {}
    for index, matrix_RC in enumerate(matrices):
        indices.setdefault((min(matrix_RC.shape), max(matrix_RC.shape)), []).append(index)
    updates = list(matrices)
    for (_, longest), group in indices.items():
        wide = [matrices[index] if _is_wide(matrices[index]) else matrices[index].mT for index in group]
        update_MRC = orthogonalise(torch.stack(wide)) * (RMS_LIKE_ADAMW * math.sqrt(longest))
        for index, update_RC in zip(group, update_MRC.to(matrices[0].dtype), strict=True):
            updates[index] = update_RC if _is_wide(matrices[index]) else update_RC.mT
    return updates


def orthogonalise(wide_MRC: Tensor) -> Tensor:
    """Newton-Schulz iteration on matrices with R <= C: U S V^T -> U S' V^T with S' between about 0.7 and 1.2; 0 -> 0.

    Singular values below about 0.01 of the Frobenius norm stay smaller. Computed in bf16 on a GPU, in float32 on a CPU.
    """
    x_MRC = wide_MRC.bfloat16() if wide_MRC.is_cuda else wide_MRC.float()
    x_MRC = x_MRC / (x_MRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_MRR = x_MRC @ x_MRC.mT
        x_MRC = torch.baddbmm(x_MRC, torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c), x_MRC, beta=a)
    return x_MRC


def _is_wide(matrix_RC: Tensor) -> bool:
    return matrix_RC.shape[0] <= matrix_RC.shape[1]
