"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with undisturbed runs.

python -m tests.helpers.survive [--kills 20] [--seed 0] [--processes 1 2] [--phases stage1 stage2 um3]

A run is started and killed until all kills are used, then runs to its end. A third of the kills hit the start, a third
a moment in the steps after a save, a third the middle of a save.
"""

import argparse
import atexit
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.train.conftest import ROOT, arguments, environment
from train.checkpoint import read_meta
from um3.core.files import sha256_of
from um3.core.metrics import read_metrics

PHASES = ("stage1", "stage2", "um3")
STEPS_PER_KILL = 5
"""More than a run takes between two kills, even if this process notices late."""
SAVE_S = 0.02
"""About the time of a tiny run's save."""
TIMEOUT_S = 240
NOT_COMPUTED = ("perf/", "mem/", "data/skipped/")
"""Metrics that measure the machine, or count since the process started."""


class Run:
    """`python -m train COMMAND`, its messages in the file `log`.

    A single process is forked from a server that has imported torch and DeepSpeed, which saves seconds a start; several
    processes are started with `--processes`.
    """

    def __init__(self, command: Sequence[str], *, log: Path, processes: int = 1):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | BaseProcess
        if processes > 1:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "train", *command, "--processes", str(processes)],
                    cwd=ROOT, env=environment(), stdout=output, stderr=output,
                )  # fmt: skip
            atexit.register(self.process.kill)
        else:
            self.process = _server().Process(target=_train, args=([*command], str(log), environment()), daemon=True)
            self.process.start()
        self.pid = self.process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the run is alive."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def workers(self) -> list[int]:
        """Process ids that the launcher started, by rank."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for `ready`; the run must still be alive."""
        deadline = time.monotonic() + TIMEOUT_S
        while not ready():
            assert self.poll() is None and time.monotonic() < deadline, f"{self.poll()}: {self.text()[-2000:]}"
            time.sleep(0.001)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running: {self.text()[-2000:]}"
            time.sleep(0.01)
        return code

    def finish(self) -> None:
        """Wait for the end, which must be a success."""
        assert self.wait() == 0, self.text()[-2000:]

    def kill(self) -> None:
        """SIGKILL the process that was started; none of its workers may outlive it."""
        workers = self.workers()
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while any(process_state(worker) not in ("Z", "") for worker in workers):
            assert time.monotonic() < deadline, f"a worker of the killed launcher is alive: {workers}"
            time.sleep(0.01)

    def pause(self) -> None:
        """SIGSTOP rank 0, which writes the files."""
        os.kill(self.writer(), signal.SIGSTOP)
        while process_state(self.writer()) not in ("T", "Z", ""):
            time.sleep(0.001)

    def unpause(self) -> None:
        """SIGCONT rank 0."""
        os.kill(self.writer(), signal.SIGCONT)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started, and leave a launcher the time to forward it."""
        os.kill(self.pid, number)
        time.sleep(0.5)

    def writer(self) -> int:
        """Process id of rank 0."""
        return next(iter(self.workers()), self.pid)

    def text(self) -> str:
        """All messages so far."""
        return self.log.read_text(errors="replace")


@cache
def _server() -> ForkServerContext:
    """A fork server that has imported everything that training needs."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["deepspeed", "train.loop", *(f"train.recipes.{phase}" for phase in PHASES)])
    first = server.Process(target=int)
    first.start()
    first.join()
    return server


def _train(command: list[str], log: str, variables: dict[str, str]) -> None:
    """In the forked process: `python -m train COMMAND`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    from train.phase import main
    from um3.core.errors import run_main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_main(lambda: main(command))


def process_state(pid: int) -> str:
    """Linux's letter for a process: T stopped, Z ended but not yet waited for; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


class Moment(NamedTuple):
    """When to kill: in the start, in the steps after the next save, or in the save after it; how far into it."""

    where: str
    share: float


def random_moments(count: int, *, seed: int) -> list[Moment]:
    """`count` moments, a third of each kind, in random order."""
    generator = random.Random(seed)
    moments = [Moment(("save", "steps", "start")[i % 3], generator.random()) for i in range(count)]
    generator.shuffle(moments)
    return moments


def killed_run(
    command: Sequence[str], *, folder: Path, moments: Sequence[Moment], start_s: float, processes: int
) -> list[int]:
    """Run `command` in `folder`, kill and restart it at each of `moments`, then let it finish.

    Returns the newest checkpoint's step at each kill.
    """
    checkpoints, steps = folder / "checkpoints", []
    for moment in moments:
        begun, until = newest(checkpoints), time.monotonic() + moment.share * start_s
        run = start(command, folder=folder, processes=processes)
        in_start = moment.where == "start"
        # At the latest after a save: if this start is faster than the first, the run must not reach its end.
        run.wait_until(lambda: newest(checkpoints) > begun or (in_start and time.monotonic() > until))  # noqa: B023
        if moment.where == "steps":
            time.sleep(moment.share * 3 * SAVE_S)
        if moment.where == "save":
            pause_in_a_save(run, checkpoints, share=moment.share)
        run.kill()
        steps.append(newest(checkpoints))
        assert moment.where != "save" or any(checkpoints.glob("*.partial")), "this kill missed the save"
    start(command, folder=folder, processes=processes).finish()
    assert steps == sorted(steps), f"{folder}: a checkpoint was lost: {steps}"
    return steps


def pause_in_a_save(run: Run, checkpoints: Path, *, share: float) -> None:
    """Stop rank 0 while a checkpoint is half written."""
    while True:
        run.wait_until(lambda: any(checkpoints.glob("*.partial")))
        time.sleep(share * SAVE_S)
        run.pause()
        if any(checkpoints.glob("*.partial")):
            return
        run.unpause()
        share /= 2


def whole_run(command: Sequence[str], *, folder: Path, processes: int) -> float:
    """Run `command` in `folder` to its end; return the seconds to its first step."""
    began = time.monotonic()
    run = start(command, folder=folder, processes=processes)
    run.wait_until(lambda: bool(read_metrics(folder / "metrics.jsonl")))
    start_s = time.monotonic() - began
    run.finish()
    return start_s


def start(command: Sequence[str], *, folder: Path, processes: int = 1) -> Run:
    """Start `command` with `folder` as its run folder and its messages in `folder`.log."""
    return Run([*command, f"loop.output_dir={folder}"], log=folder.with_suffix(".log"), processes=processes)


def newest(checkpoints: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*[0-9]")), default=0)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a finished run computed, to the bit."""
    last = read_meta(folder / f"checkpoints/step-{newest(folder / 'checkpoints'):08d}")
    return {
        "metrics": computed_metrics(folder),
        "weights and optimizer state": last["files"],
        "data state": last["state"]["data"],
        "model": sha256_of(folder / "model/model.safetensors"),
    }


def computed_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without NOT_COMPUTED."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(NOT_COMPUTED)} for row in rows]


def long_run(phase: str, inputs: Path, *, steps: int) -> list[str]:
    """Command line of a tiny run of `steps` steps, with frequent saves and a moving average of the weights."""
    options = [f"loop.max_steps={steps}", "loop.save_every_steps=2", "optimizer.ema_decay=0.9"]
    if phase == "um3":
        (inputs / "texts").mkdir(exist_ok=True)
        (inputs / "texts/readme.txt").write_text((ROOT / "README.md").read_text())
        options += [f"data.texts=[{{name: readme, path: {inputs}/texts}}]"]
    return arguments(phase, inputs, *options)


def survive(command: Sequence[str], folder: Path, *, kills: int, seed: int, processes: int = 1) -> list[int]:
    """Run `command` undisturbed in `folder`/whole and killed in `folder`/killed; both must compute the same bits.

    Returns the newest checkpoint's step at each kill.
    """
    start_s = whole_run(command, folder=folder / "whole", processes=processes)
    moments = random_moments(kills, seed=seed)
    steps = killed_run(command, folder=folder / "killed", moments=moments, start_s=start_s, processes=processes)
    compare(folder / "whole", folder / "killed")
    return steps


def compare(whole: Path, killed: Path) -> None:
    """AssertionError if two runs differ in a bit of what they computed."""
    expected, actual = outcome(whole), outcome(killed)
    for name in expected:
        assert actual[name] == expected[name], f"{killed} has other {name} than {whole}"


def main() -> None:
    """Make the inputs, then test every phase with every number of processes."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.survive", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each run (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # sums on a GPU are not the same to the bit
    num_steps = STEPS_PER_KILL * options.kills
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name, "inputs")
        for phase in ("stage1", "stage2"):
            Run(arguments(phase, inputs), log=inputs / f"{phase}.log").finish()
        codes = [f"visual_tokenizer={inputs}/stage2/model", f"output_dir={inputs}/codes", "num_threads=1"]
        codes += ["--config", "demo", "images=[{name: scenes, kind: scenes, length: 64}]"]
        encode = [sys.executable, "-m", "data_mix", "encode", *codes]
        subprocess.run(encode, cwd=ROOT, env=environment(), check=True)
        for phase, processes in itertools.product(options.phases, options.processes):
            began = time.monotonic()
            command, folder = long_run(phase, inputs, steps=num_steps), Path(name, f"{phase}-{processes}")
            steps = survive(command, folder, kills=options.kills, seed=options.seed, processes=processes)
            print(
                f"{phase}, {processes} process(es): {options.kills} kills, then the same bits as undisturbed after "
                f"{num_steps} steps ({time.monotonic() - began:.0f} s; checkpoints at the kills: "
                f"{', '.join(map(str, steps))})",
                flush=True,
            )


if __name__ == "__main__":
    main()
