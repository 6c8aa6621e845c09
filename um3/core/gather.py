"""Rows of all ranks in one tensor, with gradient. Apart from `distributed`, which must not import torch.

torch's own `torch.distributed.nn.functional.all_gather` is deprecated, and with gloo its backward pass made
about one process in ten abort as it exited (torch 2.13, CPU).

Legend: B rows of this rank, G rows of all ranks, D width.
"""

from typing import Any

import torch

from um3.core.distributed import rank, sum_over_ranks, world_size


class GatherRows(torch.autograd.Function):
    """x_BD of every rank -> x_GD in rank order; each rank's gradient is the sum over all ranks of its rows'."""

    @staticmethod
    def forward(ctx: Any, x_BD: torch.Tensor) -> torch.Tensor:
        x_BD = x_BD.contiguous()
        ctx.num_rows = len(x_BD)
        parts = [torch.empty_like(x_BD) for _ in range(world_size())]
        torch.distributed.all_gather(parts, x_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient_GD,) = gradients
        total_GD = sum_over_ranks(gradient_GD.float()).to(gradient_GD.dtype)
        first = rank() * ctx.num_rows
        return total_GD[first : first + ctx.num_rows]
