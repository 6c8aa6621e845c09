"""The FLOP/s a machine reaches in large matrix products: what a utilisation is a share of."""

import functools
import multiprocessing
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

from um3.core.errors import UserError

PEAK_S = 1.5
"""How long the products go on of which the fastest counts."""


class Peak(NamedTuple):
    """The most FLOP/s this machine was seen to reach, and how."""

    flops: float
    how: str


@functools.cache
def measure_peak(*, precision: str, processes: int, threads: int) -> Peak:
    """The fastest of a second's large matrix products, in `processes` processes at the same time.

    Args:
        precision: an engine's: float32, or bf16 or autocast for products in bf16.
        threads: CPU threads of each process; 0 leaves torch's choice.

    Raises:
        UserError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    workers = [
        context.Process(target=_multiply, args=(rank, precision, threads, barrier, results), daemon=True)
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("the machine's peak could not be measured; give it with --peak-tflops")
    found = [results.get() for _ in workers]
    return Peak(sum(flops for flops, _ in found), f"measured on {processes} x {found[0][1]}")


def _multiply(rank: int, precision: str, threads: int, barrier: Barrier, results: "SimpleQueue[Any]") -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 8192 if gpu else 2048
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, product = float("inf"), first @ second
    barrier.wait(timeout=300)
    end = time.perf_counter() + PEAK_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.matmul(first, second, out=product)
        if gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    where = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()}-thread CPU process"
    kind = str(dtype).removeprefix("torch.")
    results.put((2 * size**3 / best, f"{where}, {kind} products of {size} x {size}"))
