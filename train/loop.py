"""The one training loop: data -> losses -> step -> log -> save -> stop.

A recipe is a `Task`; the loop knows neither models nor losses.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, Protocol

import torch

from train.checkpoint import load_optimizer, load_weights, read_meta, remove_old, resume_point, save_checkpoint
from train.config import LoopConfig
from um3.core.config import to_dict
from um3.core.distributed import any_rank, barrier, is_main, rank, world_size
from um3.core.errors import Interrupted, UserError
from um3.core.files import write_json
from um3.core.metrics import MetricsWriter
from um3.core.progress import Progress, peak_gpu_memory_gib, peak_memory_gib
from um3.core.provenance import commit, machine, versions
from um3.core.seeds import seed_everything

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a recipe brings to the loop."""

    unit: str
    """What the rate counts, such as "images"."""

    def modules(self) -> dict[str, Any]:
        """The trained modules by name, before their engines exist."""

    def build_engines(self) -> dict[str, Any]:
        """Build and return the DeepSpeed engines, by the same names."""

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on the batch of `step`; returns flat metrics, `train/loss` among them.

        Must raise `NonFiniteLoss` before the optimizer step if the loss is not finite.
        """

    def state(self, step: int) -> dict[str, Any]:
        """The data state after `step` steps, equal on every rank (for checkpoints)."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint whose data state does not belong to this config (UserError)."""

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write the finished model below `folder`; returns its fingerprints and notes for done.json."""


class NonFiniteLoss(Exception):
    """The loss is not finite; carries which terms."""


class StopRequest:
    """Remembers a SIGTERM or Ctrl-C so that the loop can stop between two steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT for the duration of the loop."""
    request = StopRequest()
    previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(task: Task, *, config: Any, inputs: dict[str, str]) -> None:
    """Train `task` to its last step, resuming from the newest whole checkpoint in the phase's folder.

    Raises:
        UserError: a loss that is not finite, a checkpoint that does not fit, or none that is whole.
        Interrupted: SIGTERM; the state is saved.
        KeyboardInterrupt: Ctrl-C; the state is saved.
    """
    loop: LoopConfig = config.loop
    folder = Path(loop.output_dir)
    engines, start, spent_s = _resume(task, folder=folder / "checkpoints", inputs=inputs)
    metrics = (
        MetricsWriter(folder, resume_step=start, views=tuple(loop.loggers), config=to_dict(config))
        if is_main()
        else None
    )
    progress = Progress(loop.max_steps, label=folder.name, unit="steps", start=start)
    began = time.monotonic()
    since_save: list[dict[str, float]] = []

    def save(step: int) -> None:
        state = {"data": task.state(step), "spent_s": spent_s + time.monotonic() - began, "inputs": inputs}
        state["means"] = _means(since_save, loop.keep_best_by)
        since_save.clear()
        save_checkpoint(folder / "checkpoints", step=step, engines=engines, state=state)
        remove_old(folder / "checkpoints", keep=loop.keep_checkpoints, best_by=loop.keep_best_by)

    with stop_requests() as stop:
        for step in range(start, loop.max_steps):
            seed_everything(loop.seed, "step", step)
            values = _guarded_step(task, step=step, folder=folder)
            since_save.append(values)
            done = step + 1
            progress.advance(note=f"loss {values['train/loss']:.4g}")
            if metrics is not None and loop.is_logged(done):
                rate = progress.rate()
                values |= {"perf/steps_per_s": rate, f"perf/{task.unit}_per_s": rate * loop.batch_size}
                metrics.log(done, values | _memory("mem/peak_gib", "mem/peak_gpu_gib"))
            stopping = any_rank(stop.signal is not None)
            if done % loop.save_every_steps == 0 or done == loop.max_steps or stopping:
                save(done)
            if stopping and done < loop.max_steps:
                _leave(stop, step=done, folder=folder)
    if metrics is not None:
        metrics.close()
    _finish(task, config=config, inputs=inputs, seconds=spent_s + time.monotonic() - began)


def _resume(task: Task, *, folder: Path, inputs: dict[str, str]) -> tuple[dict[str, Any], int, float]:
    path = resume_point(folder)
    if path is None:
        return task.build_engines(), 0, 0.0
    meta = read_meta(path)
    if (before := meta["state"]["inputs"]) != inputs:
        raise UserError(
            f"{path} was trained from other inputs ({before} -> {inputs}); bring those back, or use another RUN="
        )
    task.check_state(meta["state"]["data"])
    for label, module in task.modules().items():
        load_weights(path, label=label, module=module)
    engines = task.build_engines()
    for label, engine in engines.items():
        load_optimizer(path, label=label, engine=engine)
    logger.info("resuming from %s", path)
    return engines, meta["step"], meta["state"]["spent_s"]


def _guarded_step(task: Task, *, step: int, folder: Path) -> dict[str, float]:
    try:
        values = task.train_step(step)
        if not math.isfinite(values["train/loss"]):
            raise NonFiniteLoss(f"the loss of the global batch is {values['train/loss']}")
    except NonFiniteLoss as error:
        raise UserError(
            f"step {step + 1}: {error}; nothing of this step is kept. The same command would meet it again: lower "
            f"optimizer.lr in another RUN=, with a copy of {folder}/checkpoints if it shall go on from there"
        ) from None
    return values


def _means(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    """The mean of metric `name` over steps, where they have it; by it the best checkpoint is known."""
    values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    if name and not values and is_main():
        logger.warning("loop.keep_best_by: no step has '%s'; there are %s", name, ", ".join(sorted(rows[-1])))
    return {name: fmean(values)} if values else {}


def check_finite(loss_terms: dict[str, float], *, source: str) -> None:
    """Stop every rank before the optimizer step if any rank's loss is not finite.

    Raises:
        NonFiniteLoss: names the terms, the rank and the source, of the first rank where it happened.
    """
    bad = ", ".join(f"{name} is {value}" for name, value in loss_terms.items() if not math.isfinite(value))
    if any_rank(bool(bad)):
        reports = [f"{bad} on rank {rank()} ({source})" if bad else ""] * world_size()
        if world_size() > 1:
            torch.distributed.all_gather_object(reports, reports[0])
        raise NonFiniteLoss(next(report for report in reports if report))


def _leave(stop: StopRequest, *, step: int, folder: Path) -> None:
    name = stop.signal.name if stop.signal is not None else "a signal on another rank"
    if is_main():
        logger.info(
            "stopped by %s after step %d; its state is saved in %s: the same command goes on", name, step, folder
        )
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted


def _finish(task: Task, *, config: Any, inputs: dict[str, str], seconds: float) -> None:
    folder = Path(config.loop.output_dir)
    facts = task.finish(folder)
    if is_main():
        record = {"inputs": inputs, "steps": config.loop.max_steps, "seconds": round(seconds, 1)}
        peaks = _memory("peak_memory_gib", "peak_gpu_memory_gib")
        record |= {name: round(gib, 3) for name, gib in peaks.items()} | {"processes": world_size(), **facts}
        record |= {"config": to_dict(config), "commit": commit(), "versions": versions(), "machine": machine()}
        write_json(folder / "done.json", record)
    barrier()


def _memory(host: str, gpu: str) -> dict[str, float]:
    """The first process's peaks in GiB under these names; the second where there is a GPU."""
    on_gpu = peak_gpu_memory_gib()
    return {host: peak_memory_gib()} | ({} if on_gpu is None else {gpu: on_gpu})
