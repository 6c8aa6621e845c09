"""The harness of all benchmarks: sides in their own processes, short training runs, and the machine's peak.

A process of its own gives a measurement its own peak memory. Sides alternate, and the fastest run of each is compared,
so that other work on the machine disturbs both alike.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any, NamedTuple

from um3.core.commands import positive
from um3.core.errors import UserError, last_error
from um3.core.files import read_json
from um3.core.metrics import read_metrics

if TYPE_CHECKING:
    import torch

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
GPU_PEAK = "peak_gpu_memory_gib"
STOP_S = 20
"""Seconds that a process has to end after its time limit, before it is killed."""
PEAK_S = 1.5
"""Seconds of matrix products, of which the fastest gives the peak."""
Results = dict[str, list[dict[str, Any]]]
"""By side, what each run of it printed."""


class OutOfMemory(UserError):
    """A measurement does not fit this machine."""


def benchmark_parser(name: str, about: str | None, *, sides: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a case; a comparison of `sides` gets --repeats, --threads and the hidden --side."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    if sides:
        parser.add_argument("--repeats", type=positive, default=3, help="runs of each side (default 3)")
        parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
        parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    return parser


def run_sides(name: str, arguments: Sequence[str], *, sides: Sequence[str], repeats: int) -> Results:
    """Run every side in turn, `repeats` times."""
    results: Results = {side: [] for side in sides}
    for repeat in range(repeats):
        for side, side_results in results.items():
            side_results.append(run_side(name, arguments, side=side, label=f"run {repeat + 1} of {repeats}, {side}"))
    return results


def run_side(name: str, arguments: Sequence[str], *, side: str, label: str) -> dict[str, Any]:
    """The JSON of the last line that `python -m benchmarks NAME ARGUMENTS --side SIDE` prints."""
    output = run_process(["benchmarks", name, *arguments, "--side", side], label=f"{name}: {label}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def now() -> float:
    """Seconds of a clock; on a GPU after the work that was started."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result with the fewest `seconds`."""
    return min(results, key=lambda result: result["seconds"])


def run_process(command: Sequence[str], *, label: str, limit_s: float | None = None) -> str:
    """Run `python -m COMMAND` and return what it prints; after `limit_s` seconds it is stopped, which is a UserError.

    On Linux a process inherits the peak memory of the one that starts it, so import torch only after the last call.
    OutOfMemory if it ran out of memory; UserError with its last error line if it failed otherwise.
    """
    print(label, file=sys.stderr, flush=True)
    with subprocess.Popen([sys.executable, "-m", *command], stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except BaseException as stop:
            process.terminate()
            if isinstance(stop, subprocess.TimeoutExpired):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=STOP_S)
                process.kill()
                raise UserError(f"{label}: stopped at its limit of {limit_s:.0f} s") from None
            raise
    if process.returncode:
        if process.returncode in KILLED or "out of memory" in errors or "can't allocate memory" in errors:
            raise OutOfMemory(f"{label}: out of memory; choose a smaller batch or model")
        raise UserError(f"{label}: {last_error(errors, code=process.returncode)}")
    return output


class TrainingRun(NamedTuple):
    """A finished phase: its folder, one row of metrics for every step, and its done.json."""

    folder: Path
    rows: list[dict[str, Any]]
    done: dict[str, Any]

    @property
    def peak_gib(self) -> float:
        """Peak memory of the first process during its steps (GiB): torch's on a GPU, else resident memory."""
        return float(self.done.get(GPU_PEAK, self.rows[-1]["mem/peak_gib"]))

    @property
    def peak_kind(self) -> str:
        """What `peak_gib` measures."""
        return "peak GPU memory (torch)" if GPU_PEAK in self.done else "peak resident memory of a process"

    def step_seconds(self, *, warmup: int, cpu: bool = False) -> list[float]:
        """Seconds of every step after `warmup` steps (at least 1), from the loop's own clock; or the first process's
        CPU seconds, of all its threads."""
        clock = [row["perf/cpu_s"] if cpu else row["step"] / row["perf/steps_per_s"] for row in self.rows]
        return [later - earlier for earlier, later in itertools.pairwise(clock)][warmup - 1 :]

    def step_tokens(self, *, warmup: int) -> float:
        """Tokens without padding that UM3 read in a step, the mean of the steps after `warmup` steps."""
        before, after = (
            sum(value for key, value in row.items() if key.startswith(("data/text_tokens/", "data/visual_tokens/")))
            for row in (self.rows[warmup - 1], self.rows[-1])
        )
        return (after - before) / (len(self.rows) - warmup)

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit, machine and package versions of the run, and the kind of its peak memory."""
        return {key: self.done[key] for key in ("commit", "machine", "versions")} | {"peak_kind": self.peak_kind}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options for `train_phase`: the experiment and settings over it."""
    parser.add_argument("--config", default="demo", help="experiment: a name or a YAML file (default demo)")
    parser.add_argument("--tokenizer", help="QLIP folder that stage 2 starts from (default: trained here)")
    parser.add_argument("--stage1", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage 1 only")
    parser.add_argument("--stage2", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage 2 only")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every phase")


def add_step_options(parser: argparse.ArgumentParser, *, steps: int, warmup: int) -> None:
    """Options for a measurement of training steps."""
    parser.add_argument("--steps", type=positive, default=steps, help=f"measured steps (default {steps})")
    parser.add_argument("--warmup", type=positive, default=warmup, help=f"steps before them (default {warmup})")
    parser.add_argument("--peak-tflops", type=float, help="the machine's TFLOP/s; measured unless given")


def train_phase(
    phase: str, *, options: argparse.Namespace, steps: int, folder: Path, settings: Sequence[str] = (), label: str = ""
) -> TrainingRun:
    """Run `python -m train PHASE` for `steps` steps in `folder`/PHASE, logging every step and saving the last."""
    output_dir = folder / phase
    command = ["train", phase, "--config", options.config, "--processes", str(getattr(options, "processes", 1))]
    command += [*options.overrides, *getattr(options, phase, ()), *settings, f"loop.output_dir={output_dir}"]
    command += [f"loop.max_steps={steps}", "loop.log_every_steps=1", f"loop.save_every_steps={steps}"]
    run_process(command, label=label or f"{phase}: {steps} steps")
    return TrainingRun(output_dir, read_metrics(output_dir / "metrics.jsonl"), read_json(output_dir / "done.json"))


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for runs of which only the figures are kept."""
    return tempfile.TemporaryDirectory(prefix="um3-benchmark-", ignore_cleanup_errors=True)


class Peak(NamedTuple):
    """FLOP/s that a utilisation is a share of, and how they were obtained."""

    flops: float
    how: str


@functools.cache
def machine_peak(*, precision: str, processes: int = 1, threads: int = 0, tflops: float | None = None) -> Peak:
    """The FLOP/s of large matrix products in `processes` processes at the same time, or the given `tflops`.

    The `precision` is one of the engine's; all but fp32 multiply in bf16. With 0 `threads` torch chooses their number.
    """
    if tflops:
        return Peak(tflops * 1e12, "given")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    workers = []
    for rank in range(processes):
        arguments = (rank, precision, threads, barrier, results)
        workers.append(context.Process(target=_multiply, args=arguments, daemon=True))
        workers[-1].start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("the machine's peak could not be measured; pass it with --peak-tflops")
    measured = [results.get() for _ in workers]
    return Peak(sum(flops for flops, _ in measured), f"measured on {processes} x {measured[0][1]}")


def _multiply(rank: int, precision: str, threads: int, barrier: Barrier, results: "SimpleQueue[Any]") -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)  # whose work the clock waits for
    barrier.wait(timeout=300)
    flops, what = fastest_product(precision=precision, device=device)
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()}-thread CPU process"
    results.put((flops, f"{name}, {what}"))


def fastest_product(*, precision: str, device: "torch.device", clock: Callable[[], float] = now) -> tuple[float, str]:
    """FLOP/s of the fastest of PEAK_S seconds of large matrix products in this process, and their kind."""
    import torch

    from tokenizer import onednn

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 8192 if device.type == "cuda" else 2048
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best_s, product = float("inf"), first @ second
    end = time.perf_counter() + PEAK_S
    while time.perf_counter() < end:
        start = clock()
        if onednn.serves(first, second):
            onednn.linear(first, second)
        else:
            torch.matmul(first, second, out=product)
        best_s = min(best_s, clock() - start)
    kind = str(dtype).removeprefix("torch.")
    return 2 * size**3 / best_s, f"{kind} products of {size} x {size}"
