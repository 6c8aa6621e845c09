"""Ranks and the few collectives the project needs; every function also works in a single process.

torch is imported where it is needed: who only asks for the rank should not wait seconds for it.
"""

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from um3.core.errors import UserError

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Global rank of this process; 0 when nothing is launched."""
    group = _process_group()
    return int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the job; 1 when nothing is launched."""
    group = _process_group()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one process that logs and writes files."""
    return rank() == 0


def prepare_environment() -> None:
    """Set the launcher's variables for a single process started without `torchrun` or `deepspeed`.

    Without them DeepSpeed tries to discover MPI and dies asking for mpi4py.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def free_port() -> int:
    """A TCP port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def device() -> "torch.device":
    """The accelerator of this local rank, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1 and (group := _process_group()):
        group.barrier()


def wait_for_main(*, hours: float = 72) -> None:
    """Wait for the first rank where it does alone what may take hours; in a barrier the others would give up on it."""
    if world_size() > 1 and (group := _process_group()):
        patient = group.new_group(backend="gloo", timeout=timedelta(hours=hours))
        group.barrier(group=patient)
        group.destroy_process_group(patient)


def wait_for_file(path: Path) -> None:
    """Wait until the first rank has made `path`.

    Raises:
        UserError: this process cannot see it.
    """
    wait_for_main()
    if not path.exists():
        raise UserError(f"{path} cannot be seen by this process; put the run folder where every machine sees it")


def make_once(path: Path, make: Callable[[], object]) -> Path:
    """Have the first rank `make` the file `path` unless it exists, and return it on every rank (a collective call).

    `make` must write it atomically (`um3.core.files`).

    Raises:
        UserError: this process cannot see the first rank's file.
    """
    if is_main() and not path.exists():
        make()
    wait_for_file(path)
    return path


def leave_group() -> None:
    """Take leave of the other ranks at a process's very end: NCCL warns where that is left out."""
    if (group := _process_group()) and group.get_backend() == "nccl":
        group.destroy_process_group()


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """Elementwise sum of `values` over all ranks (a new tensor, no gradient)."""
    values = values.detach().clone()
    if world_size() > 1 and (group := _process_group()):
        group.all_reduce(values)
    return values


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over all ranks, which must hold the same keys in the same order."""
    if world_size() == 1:
        return values
    import torch

    sums = sum_over_ranks(torch.tensor(list(values.values()), dtype=torch.float32, device=device()))
    return dict(zip(values, (sums / world_size()).tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    import torch

    return flag if world_size() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device())) > 0)


def gather_with_gradient(x_BD: "torch.Tensor") -> "torch.Tensor":
    """Concatenate `x_BD` of all ranks, in rank order, along the batch; gradients flow back to each rank."""
    if world_size() == 1:
        return x_BD
    from um3.core.gather import GatherRows

    return GatherRows.apply(x_BD)


def gather_flat(part: "torch.Tensor") -> "torch.Tensor":
    """Concatenate the equally long vectors `part` of all ranks, in rank order (no gradient)."""
    if world_size() == 1 or not (group := _process_group()):
        return part
    whole = part.new_empty(world_size() * len(part))
    group.all_gather_into_tensor(whole, part.contiguous())
    return whole


def _process_group() -> Any:
    """torch.distributed where a process group runs, else None."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None
