"""The one training loop: data -> losses -> step -> eval -> log -> save -> stop.

A recipe is a `Task`: its `train_step` does data, losses and step, its `evaluate` the evaluations that are due. The
loop logs, saves and stops; it knows neither models nor losses. Evaluation comes before logging because
metrics.jsonl has one row a step.
"""

import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import nn

from train.checkpoint import (
    load_optimizer,
    load_weights,
    read_checkpoint,
    remove_old,
    resume_point,
    save_checkpoint,
)
from train.config import LoopConfig, OptimizerConfig, PhaseConfig
from train.engine import build_engine, precision_of, split_batch
from train.optim import other_length, schedule_factor, set_learning_rate
from train.run_folder import data_fingerprints, refuse_other_run, result_files, start_folder, write_record
from um3.core.config import to_dict, with_defaults
from um3.core.distributed import any_rank, bf16_speedup, device, is_main, rank, wait_for_main, world_size
from um3.core.errors import EXIT_INTERRUPTED, Interrupted, UserError
from um3.core.metrics import NO_SAMPLES, MetricsWriter, Samples, commit, machine, versions
from um3.core.progress import Progress, peak_gpu_memory_gib, peak_memory_gib
from um3.core.seeds import seed_everything

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=PhaseConfig)
LOG_FILE = "train.log"
"""In the phase's folder: what its first process logs, also of earlier starts."""


class Task(ABC, Generic[ConfigT]):
    """What a recipe provides to the loop, with what most recipes have in common: one objective in one engine."""

    config: ConfigT
    objective: nn.Module
    """The model with its losses; its engine is `engine`."""
    unit: str
    """What a batch consists of, such as "images"."""
    tokens_per_sample: int
    """Tokens (of a tokenizer: patches) of a sample, at most; for the line at the start."""
    shown: Mapping[str, Samples] = NO_SAMPLES
    """Images of the last `evaluate`, by name, for TensorBoard and W&B."""

    def modules(self) -> dict[str, Any]:
        """The trained modules by name, before their engines exist."""
        return {"model": self.objective}

    def build_engines(self) -> dict[str, Any]:
        """Build and return the DeepSpeed engines, by the names of `modules`."""
        config = self.config
        self.micro_batch_size, self.accumulation = split_batch(config.loop)
        self.engine = build_engine(self.objective, optimizer=config.optimizer, engine=config.engine, loop=config.loop)
        return {"model": self.engine}

    def set_rate(self, engine: Any, config: OptimizerConfig, *, step: int) -> float:
        """Set the learning rate of `step` in an engine's optimizer; return the rate without `module_lr`."""
        factor = schedule_factor(step, max_steps=self.config.loop.max_steps, config=config)
        set_learning_rate(engine.optimizer, factor=factor)
        return config.lr * factor

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """Take optimizer step `step` (from 0) on its batch; return flat metrics, `train/loss` among them.

        Must raise `NonFiniteLoss` before the optimizer step if the loss is not finite.
        """

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the evaluations that are due after `step` steps; empty if none is due (a collective call)."""
        return {}

    @property
    def finished(self) -> bool:
        """Whether training ends before `loop.max_steps`: nothing is left to improve."""
        return False

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what the batches depend on besides the config: data, vocabularies."""

    @abstractmethod
    def state(self, step: int) -> dict[str, Any]:
        """The data state after `step` steps, equal on every rank, for a checkpoint."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's data state; raise UserError if it does not belong to this config."""

    @abstractmethod
    def finish(self, folder: Path) -> dict[str, Any]:
        """Write the finished model below `folder`; return its fingerprints and notes for done.json."""


class NonFiniteLoss(Exception):
    """The loss is not finite; the message names the terms."""


def run(task: Task, *, config: Any, inputs: dict[str, str]) -> None:
    """Train `task` to its last step, resuming from the newest valid checkpoint in the phase's folder.

    UserError: a loss that is not finite, a checkpoint of another run, or no valid checkpoint. After SIGTERM and Ctrl-C
    it raises Interrupted, with the state saved.
    """
    loop: LoopConfig = config.loop
    folder = Path(loop.output_dir)
    run: dict[str, Any] = {"config": to_dict(config), "inputs": inputs}
    if is_main():
        run |= {"data": data_fingerprints(config), "fingerprints": task.fingerprints()}
    weights = [weight for module in task.modules().values() for weight in module.parameters()]
    trained, total = (sum(w.numel() for w in weights if w.requires_grad or not only) for only in (True, False))
    engines, start, state = _resume(task, config=config, run=run)
    metrics = None
    if is_main():
        start_folder(config)
        rows = state.get("metrics_rows", 0)
        logger.info("%s", _start_line(task, config=config, trained=trained, total=total, start=start))
        if device().type == "cpu" and precision_of(config.engine) != "fp32" and (ratio := bf16_speedup()) < 1:
            logger.warning(
                "bf16 is slow here: this CPU multiplies %.2g times as fast in it as in fp32; set engine.precision=fp32",
                ratio,
            )
        metrics = MetricsWriter(folder, resume_step=start, num_rows=rows, views=loop.loggers, config=to_dict(config))
    done = start
    progress = Progress(loop.max_steps, label=folder.name, unit="steps", start=start)
    began, spent_s = time.monotonic(), state.get("spent_s", 0.0)
    since_save: list[dict[str, float]] = []

    def save(step: int) -> None:
        state = {"data": task.state(step), "spent_s": spent_s + time.monotonic() - began, "run": run}
        state["metrics_rows"] = metrics.num_rows if metrics else 0
        state["means"] = _means(since_save, loop.keep_best_by)
        since_save.clear()
        save_checkpoint(folder / "checkpoints", step=step, engines=engines, state=state)
        remove_old(folder / "checkpoints", keep=loop.keep_checkpoints, best_by=loop.keep_best_by)

    with stop_requests() as received:
        while done < loop.max_steps and not task.finished:
            step, done = done, done + 1
            seed_everything(loop.seed, "step", step, *([rank()] if rank() else []))  # a rank draws its own dropout
            values = _train_step(task, step=step, folder=folder)  # data, losses, step
            values |= task.evaluate(done)
            since_save.append(values)
            progress.advance(note=f"loss {values['train/loss']:.4g}")
            if metrics is not None and loop.is_logged(done):
                rate = progress.rate()
                values |= {"perf/steps_per_s": rate, f"perf/{task.unit}_per_s": rate * loop.batch_size}
                values["perf/cpu_s"] = time.process_time()
                metrics.log(done, values | _memory("mem/peak_gib", "mem/peak_gpu_gib"))
                metrics.show(done, task.shown)
            stopping, is_last = any_rank(bool(received)), done == loop.max_steps or task.finished
            if done % loop.save_every_steps == 0 or is_last or stopping:
                save(done)
            if stopping and not is_last:
                _stop(received, step=done, folder=folder)
    if metrics is not None:
        metrics.close()
    run |= {"precision": precision_of(config.engine)}
    _finish(task, folder=folder, run=run, steps=done, seconds=spent_s + time.monotonic() - began)


def _start_line(task: Task, *, config: Any, trained: int, total: int, start: int) -> str:
    """What is about to run, in one line: device, precision, weights, a step's work, folder and next save."""
    loop: LoopConfig = config.loop
    each = f"{task.tokens_per_sample:,} tokens"
    step = f"{loop.batch_size:,} {task.unit} of at most {each}, {loop.batch_size * task.tokens_per_sample:,} in all"
    number, of = (f"{count / 1e6:,.1f} M" for count in (trained, total))
    name = torch.cuda.get_device_name() if device().type == "cuda" else device().type
    facts = [
        f"{world_size()} x {name}",
        f"precision: {precision_of(config.engine)} (engine.precision={config.engine.precision})",
        f"{number} parameters" if trained == total else f"{number} of {of} parameters are trained",
        f"a step has {step}",
        f"steps {start + 1:,} to {loop.max_steps:,}",
        f"next save after {min(loop.max_steps, (start // loop.save_every_steps + 1) * loop.save_every_steps):,}",
        f"log in {Path(loop.output_dir, LOG_FILE)}",
    ]
    return f"{Path(loop.output_dir).name}: {'; '.join(facts)}"


def _resume(task: Task, *, config: Any, run: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(engines, first step, state of the loop), from the newest valid checkpoint of this run, or `resume_from`; the
    checkpoint must have the same `run` (on the first rank; the others end with it)."""
    loop: LoopConfig = config.loop
    found = resume_point(Path(loop.output_dir, "checkpoints"))
    if found is None and loop.resume_from:
        path = Path(loop.resume_from)
        meta, files = read_checkpoint(path)
        if files:
            raise UserError(f"loop.resume_from={path} is not a whole checkpoint ({files[0]}); set another one")
        run, found = {name: value for name, value in run.items() if name != "config"}, (path, meta)
    if found is None:
        return task.build_engines(), 0, {}
    path, meta = found
    if "run" not in meta["state"]:
        raise UserError(f"{path} was written by another version of this project; use another RUN=")
    old = meta["state"]["run"]
    if "config" in run:
        old["config"] = with_defaults(type(config), old["config"], origin=str(path))
    refuse_other_run(path, old, run, folder=Path(loop.output_dir), steps=meta["step"])
    task.load_state(meta["state"]["data"])
    for label, module in task.modules().items():
        load_weights(path, label=label, module=module)
    engines = task.build_engines()
    for label, engine in engines.items():
        load_optimizer(path, step=meta["step"], label=label, engine=engine)
    logger.info("resuming from %s", path)
    if "config" in run and (note := other_length(config, old=old["config"], steps=meta["step"])):
        logger.info("%s", note)
    return engines, meta["step"], meta["state"]


def _train_step(task: Task, *, step: int, folder: Path) -> dict[str, float]:
    try:
        values = task.train_step(step)
        if not math.isfinite(values["train/loss"]):
            raise NonFiniteLoss(f"the loss of the global batch is {values['train/loss']}")
    except NonFiniteLoss as error:
        raise UserError(
            f"step {step + 1}: non-finite loss ({error}); the step was discarded. Rerunning fails again: start a new "
            f"RUN= with a lower optimizer.lr, and loop.resume_from={folder}/checkpoints/step-... for the steps before"
        ) from None
    return values


def check_finite(loss_terms: dict[str, float], *, source: str) -> None:
    """Raise NonFiniteLoss on every rank if any has a term that is not finite, naming the first such rank's terms and
    `source` (a collective call)."""
    bad_terms = ", ".join(f"{name} is {value}" for name, value in loss_terms.items() if not math.isfinite(value))
    if any_rank(bool(bad_terms)):
        reports = [f"{bad_terms} on rank {rank()}: {source}" if bad_terms else ""] * world_size()
        if world_size() > 1:
            torch.distributed.all_gather_object(reports, reports[0])
        raise NonFiniteLoss(next(report for report in reports if report))


def _means(steps: list[dict[str, float]], name: str) -> dict[str, float]:
    """The mean of metric `name` over the steps that have it; the best checkpoint is chosen by it."""
    values = [values[name] for values in steps if math.isfinite(values.get(name, math.nan))]
    if name and not values and is_main():
        logger.warning("loop.keep_best_by: no step has '%s'; the metrics are %s", name, ", ".join(sorted(steps[-1])))
    return {name: fmean(values)} if values else {}


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT, so that the loop can stop between two steps; a second Ctrl-C stops at once."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(received: list[signal.Signals], *, step: int, folder: Path) -> NoReturn:
    name = received[-1].name if received else "a signal to another rank"
    if is_main():
        logger.info("stopped by %s after step %d; saved in %s. Run the same command to resume", name, step, folder)
    raise Interrupted(EXIT_INTERRUPTED if signal.SIGINT in received[-1:] else 0)


def _finish(task: Task, *, folder: Path, run: dict[str, Any], steps: int, seconds: float) -> None:
    facts = task.finish(folder)
    if is_main():
        peaks = _memory("peak_memory_gib", "peak_gpu_memory_gib")
        record = run | {"steps": steps, "seconds": round(seconds, 1)}
        record |= {name: round(gib, 3) for name, gib in peaks.items()} | {"processes": world_size(), **facts}
        record |= {"commit": commit(), "versions": versions(), "machine": machine(), "files": result_files(folder)}
        write_record(folder / "done.json", record)
    wait_for_main()


def _memory(host: str, gpu: str) -> dict[str, float]:
    """The first process's peak memory in GiB, under the name `host`, and of its GPU if it has one, under `gpu`."""
    gpu_gib = peak_gpu_memory_gib()
    return {host: peak_memory_gib()} | ({} if gpu_gib is None else {gpu: gpu_gib})
