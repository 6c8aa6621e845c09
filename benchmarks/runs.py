"""What the benchmarks share: a process of its own for every measurement, and short runs of the real training."""

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.metrics import read_metrics

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
GPU_PEAK = "peak_gpu_memory_gib"


class OutOfMemory(UserError):
    """A measurement that does not fit this machine."""


class Run(NamedTuple):
    """A finished phase: its folder, one row of metrics for every step, and its done.json."""

    folder: Path
    rows: list[dict[str, Any]]
    done: dict[str, Any]

    @property
    def peak_gib(self) -> float:
        """The most memory the first process had in its steps (GiB): torch's on a GPU, else what was resident."""
        return float(self.done.get(GPU_PEAK, self.rows[-1]["mem/peak_gib"]))

    @property
    def peak_kind(self) -> str:
        """What `peak_gib` is."""
        return "peak GPU memory (torch)" if GPU_PEAK in self.done else "peak resident memory of a process"


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1; None stands for a default.

    Raises:
        UserError: names the option.
    """
    for name in names:
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def run_apart(command: Sequence[str], *, label: str) -> str:
    """What `python -m COMMAND` prints, from a process of its own, so that its peak memory is its own.

    On Linux a process inherits the peak of the one that starts it: who measures small ones imports no torch before.

    Raises:
        OutOfMemory: it ran out of memory.
        UserError: it failed otherwise; with the line that says why.
    """
    print(label, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()  # and leaving the block waits for it
            raise
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        if process.returncode in KILLED or "out of memory" in errors or "can't allocate memory" in errors:
            raise OutOfMemory(f"{label}: out of memory; choose a smaller batch or model")
        raise UserError(f"{label}: {reason.removeprefix('error: ')}")
    return output


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained, for `train_phase`."""
    parser.add_argument(
        "--config", default="configs/demo.yaml", help="YAML file of an experiment (default configs/demo.yaml)"
    )
    parser.add_argument("--tokenizer", help="QLIP folder for stage 2 (default: what stage 1 has just made)")
    parser.add_argument("--stage1", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage 1 alone")
    parser.add_argument("--stage2", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage 2 alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of both stages")


def train_phase(
    phase: str, *, options: argparse.Namespace, steps: int, folder: Path, settings: Sequence[str] = (), label: str = ""
) -> Run:
    """Run the real `python -m train PHASE` for `steps` steps in `folder`/PHASE; every step is logged, the last saved.

    Raises:
        UserError: it failed.
    """
    place = folder / phase
    command = ["train", phase, "--config", options.config]
    command += ["--processes", str(getattr(options, "processes", 1))]
    command += [*options.overrides, *getattr(options, phase), *settings]
    command += [f"loop.output_dir={place}", f"loop.max_steps={steps}", "loop.log_every_steps=1"]
    run_apart([*command, f"loop.save_every_steps={steps}"], label=label or f"{phase}: {steps} steps")
    return Run(place, read_metrics(place / "metrics.jsonl"), read_json(place / "done.json"))


def provenance(*runs: Run) -> dict[str, Any]:
    """Where the figures of these runs come from: commit, machine, package versions, and the peak memory's kind."""
    return {key: runs[0].done[key] for key in ("commit", "machine", "versions")} | {"peak_kind": runs[0].peak_kind}


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for runs whose figures are all that is kept."""
    return tempfile.TemporaryDirectory(prefix="um3-benchmark-", ignore_cleanup_errors=True)
