"""Ranks and the few collectives the project needs; every function also works in a single process."""

import os
import socket

import torch
import torch.distributed as dist


def rank() -> int:
    """Global rank of this process; 0 when nothing is launched."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the job; 1 when nothing is launched."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one process that logs and writes files."""
    return rank() == 0


def prepare_environment() -> None:
    """Set the launcher's variables for a single process started without `torchrun` or `deepspeed`.

    Without them DeepSpeed tries to discover MPI and dies asking for mpi4py.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def device() -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum of `values` over all ranks (a new tensor, no gradient)."""
    values = values.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device())) > 0)


def gather_with_gradient(x_BD: torch.Tensor) -> torch.Tensor:
    """Concatenate `x_BD` of all ranks, in rank order, along the batch; gradients flow back to each rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_BD
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x_BD), dim=0)
