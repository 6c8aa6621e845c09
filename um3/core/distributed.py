"""Ranks, their device and its precision, and the collectives of the project; all also work in a single process.

torch is imported inside the functions, because reading the rank must not take seconds.
"""

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from um3.core.errors import UserError

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc, mallopt(3): free memory above which it shrinks the heap (-1: never), and how many blocks it maps alone."""
BF16_TRIAL_SIZE, BF16_TRIALS = 512, 5
"""Rows and columns of the matrices of `bf16_speedup`, and how often it multiplies them; the fastest time counts."""


def rank() -> int:
    """Global rank of this process; 0 without a launcher."""
    group = _process_group()
    return int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the job; 1 without a launcher."""
    group = _process_group()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0, the only process that logs and writes files."""
    return rank() == 0


def prepare_environment() -> None:
    """Set a launcher's variables for a single process; without them DeepSpeed looks for MPI."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        port = str(free_port())
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def take_gpu() -> None:
    """Make this process's GPU, if there are any, the current one: NCCL, CUDA graphs, torch's memory statistics and
    DeepSpeed use that. UserError if there are fewer GPUs than processes."""
    import torch

    if not torch.cuda.is_available():
        return
    gpu, count = device(), torch.cuda.device_count()
    if gpu.index >= count:
        raise UserError(f"there is no GPU for local process {gpu.index}: this machine has {count}; set NPROC={count}")
    torch.cuda.set_device(gpu)


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_cpu(num_threads: int) -> None:
    """Set torch's threads (0: its default); without a GPU, make glibc keep the memory of freed tensors for the next.

    The threads of all processes of a machine never outnumber its cores. glibc would return large blocks to the kernel
    and get them back as fresh pages, filled with zeros: 14 % of the time of a training step of SmolLM2-135M, a fifth of
    the time of `make codes`. Up to a fifth more memory is in use, because the kept blocks do not always fit. With one
    of glibc's own MALLOC_ variables in the environment it keeps to them.
    """
    import torch

    if num_threads:
        share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, min(num_threads, share)))
    libc = ctypes.CDLL(None)
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if not (is_set or torch.cuda.is_available()) and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def free_port() -> int:
    """An unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def device() -> "torch.device":
    """The accelerator of this local rank, or the CPU."""
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def inference_device() -> "torch.device":
    """Where a model runs unless its user names a device: CUDA, else Apple's MPS, else the CPU."""
    import torch

    is_mac = not torch.cuda.is_available() and torch.backends.mps.is_available()
    return torch.device("mps") if is_mac else device()


def bf16_pays(on: "torch.device") -> bool:
    """Whether bf16 matrix products are faster than float32 ones on this device: a GPU, or a CPU with AMX for bf16.

    AVX-512's bf16 instructions pay for some models only (1.9 times for 135M parameters on an AMD EPYC, torch 2.13).
    """
    import torch

    query = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch that we support
    return on.type == "cuda" or bool(query and query().get("amx_bf16"))


def bf16_speedup() -> float:
    """How many times as fast as in float32 this CPU's threads multiply in bf16 (a product of about a millisecond)."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        factor_MM = torch.ones(BF16_TRIAL_SIZE, BF16_TRIAL_SIZE, dtype=dtype)
        times = []
        for _ in range(BF16_TRIALS):
            start = time.perf_counter()
            torch.nn.functional.linear(factor_MM, factor_MM)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def resolve_precision(precision: str, *, on: "torch.device | None" = None) -> str:
    """The precision itself; "auto" becomes bf16-mixed where bf16 pays on a device (this process's), else fp32."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if bf16_pays(on or device()) else "fp32"


def mixed_precision(precision: str) -> "torch.autocast":
    """The autocast context of a precision on this process's device: bf16 matrix products for bf16-mixed, else off."""
    import torch

    is_mixed = resolve_precision(precision) == "bf16-mixed"
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=is_mixed)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1 and (group := _process_group()):
        group.barrier()


def wait_for_main(*, hours: float = 72) -> None:
    """Wait for rank 0 while it does hours of work alone; a plain barrier would time out on the other ranks."""
    if world_size() > 1 and (group := _process_group()):
        patient = group.new_group(backend="gloo", timeout=timedelta(hours=hours))
        group.barrier(group=patient)
        group.destroy_process_group(patient)


def make_once(path: Path, make: Callable[[], object]) -> Path:
    """Let rank 0 `make` the file `path`, atomically, unless it exists; return it on every rank (a collective call)."""
    if is_main() and not path.exists():
        make()
    wait_for_main()
    if not path.exists():
        raise UserError(f"this process cannot see {path}; put the run folder on a disk that every machine shares")
    return path


def leave_group() -> None:
    """Destroy the process group at exit (NCCL warns otherwise)."""
    if (group := _process_group()) and group.get_backend() == "nccl":
        group.destroy_process_group()


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """Elementwise sum of `values` over all ranks (a new tensor, no gradient)."""
    values = values.detach().clone()
    if world_size() > 1 and (group := _process_group()):
        group.all_reduce(values)
    return values


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all ranks, which must hold the same keys in the same order."""
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
    """Concatenate `x_BD` of all ranks, in rank order, along the batch; gradients flow back to each rank.

    torch.distributed.nn.functional.all_gather is deprecated, and with gloo its backward pass made one process in ten
    abort at exit (torch 2.13, CPU).
    """
    if world_size() == 1:
        return x_BD
    import torch

    parts = list(gather_flat(x_BD.detach()).split(len(x_BD)))
    parts[rank()] = x_BD
    whole = torch.cat(parts)  # (global batch, D)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: sum_over_ranks(gradient.float()).to(gradient.dtype))
    return whole


def gather_flat(part: "torch.Tensor") -> "torch.Tensor":
    """Concatenate `part` (of equal shapes) of all ranks along its first dimension, in rank order (no gradient)."""
    if world_size() == 1 or not (group := _process_group()):
        return part
    whole = part.new_empty(world_size() * len(part), *part.shape[1:])
    group.all_gather_into_tensor(whole, part.contiguous())
    return whole


def _process_group() -> Any:
    """torch.distributed if a process group is initialized, else None."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None
