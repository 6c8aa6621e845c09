"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with undisturbed ones.

python -m tests.helpers.survive [--kills 20] [--seed 0] [--processes 1 2] [--phases stage1 stage2 um3]

A killed run is started, killed and started again until all kills are spent, then left to its end. A third of the
kills fall into start-up, a third on a moment of the steps and saves after it, a third into the middle of a save.
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
from typing import Any, Literal, NamedTuple

from tests.train.conftest import ROOT, arguments, environment
from train.checkpoint import read_meta
from um3.core.files import sha256_of
from um3.core.metrics import read_metrics

PHASES = ("stage1", "stage2", "um3")
STEPS_PER_KILL = 5
"""More than what a killed run gets done between two kills, even where this process is slow to look."""
SAVE_S = 0.02
"""About what the save of a tiny run takes."""
TIMEOUT_S = 240
NOT_COMPUTED = ("perf/", "mem/", "data/skipped/")


class Run:
    """`python -m train COMMAND`, its messages in the file `log`.

    One process is forked from a server that has imported torch and DeepSpeed already, which saves seconds a start;
    several are what `--processes` starts.
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
            atexit.register(self.process.kill)  # what a failed test leaves ends with the tests
        else:
            work = ([*command], str(log), environment())
            self.process = _server().Process(target=_train, args=work, daemon=True)
            self.process.start()
        self.pid = self.process.pid or 0

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while the run goes on."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def workers(self) -> list[int]:
        """Process ids of what the launcher started, by rank."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for `ready`; the run must still be going by then."""
        deadline = time.monotonic() + TIMEOUT_S
        while not ready():
            assert self.poll() is None and time.monotonic() < deadline, f"{self.poll()}: {self.text()[-2000:]}"
            time.sleep(0.001)

    def wait(self) -> int:
        """The exit code at the end of the run."""
        deadline = time.monotonic() + TIMEOUT_S
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"goes on: {self.text()[-2000:]}"
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """SIGKILL to the process that was started; none of its workers may outlive it."""
        workers = self.workers()
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while any(process_state(worker) not in ("Z", "") for worker in workers):
            assert time.monotonic() < deadline, f"a worker of the killed launcher goes on: {workers}"
            time.sleep(0.01)

    def pause(self) -> None:
        """SIGSTOP to the process that writes, which is rank 0's."""
        os.kill(self.writer(), signal.SIGSTOP)
        while process_state(self.writer()) not in ("T", "Z", ""):
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process that was started, and the time a launcher takes to pass it on."""
        os.kill(self.pid, number)
        time.sleep(0.5)

    def go_on(self) -> None:
        """SIGCONT after `pause`."""
        os.kill(self.writer(), signal.SIGCONT)

    def writer(self) -> int:
        """Process id of rank 0."""
        return next(iter(self.workers()), self.pid)

    def text(self) -> str:
        """All messages so far."""
        return self.log.read_text(errors="replace")


@cache
def _server() -> ForkServerContext:
    """What forks processes that have imported all that training needs, ready to do so."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["deepspeed", "train.loop", *(f"train.{phase}" for phase in PHASES)])
    first = server.Process(target=int)
    first.start()
    first.join()
    return server


def _train(command: list[str], log: str, variables: dict[str, str]) -> None:
    """In the forked process: what `python -m train` does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = ["train", *command]
    from train.__main__ import main
    from um3.core.errors import run_main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_main(main)


def process_state(pid: int) -> str:
    """Linux's letter for what a process does: T stopped, Z ended and not asked for its exit code; empty: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


class Moment(NamedTuple):
    """When to kill: in the start-up, after the next save, or in the save after that; how far into it."""

    where: Literal["start", "steps", "save"]
    share: float


def random_moments(count: int, *, seed: int) -> list[Moment]:
    """`count` moments, of each kind a third, in random order."""
    draw = random.Random(seed)
    kinds: list[Literal["start", "steps", "save"]] = ["save", "steps", "start"]
    moments = [Moment(kinds[i % 3], draw.random()) for i in range(count)]
    draw.shuffle(moments)
    return moments


def killed_run(
    command: Sequence[str], *, folder: Path, moments: Sequence[Moment], start_s: float, processes: int
) -> list[int]:
    """Run `command` in `folder`, kill it at each of `moments` and start it again, the last time to its end.

    Returns the newest checkpoint's step at each kill.
    """
    checkpoints, steps = folder / "checkpoints", []
    for moment in moments:
        begun, until = newest(checkpoints), time.monotonic() + moment.share * start_s
        run = start(command, folder=folder, processes=processes)
        in_start = moment.where == "start"
        # At the latest after a save, so that a start quicker than the first does not lead to the run's end.
        run.wait_until(lambda: newest(checkpoints) > begun or (in_start and time.monotonic() > until))  # noqa: B023
        if moment.where == "steps":
            time.sleep(moment.share * 3 * SAVE_S)
        if moment.where == "save":
            pause_in_a_save(run, checkpoints, share=moment.share)
        run.kill()
        steps.append(newest(checkpoints))
        assert moment.where != "save" or any(checkpoints.glob("*.partial")), "this kill missed the save"
    finish(start(command, folder=folder, processes=processes))
    assert steps == sorted(steps), f"{folder}: a checkpoint was lost: {steps}"
    return steps


def pause_in_a_save(run: Run, checkpoints: Path, *, share: float) -> None:
    """Stop the process that writes while a checkpoint is half written."""
    while True:
        run.wait_until(lambda: any(checkpoints.glob("*.partial")))
        time.sleep(share * SAVE_S)
        run.pause()
        if any(checkpoints.glob("*.partial")):
            return
        run.go_on()
        share /= 2


def whole_run(command: Sequence[str], *, folder: Path, processes: int) -> float:
    """Run `command` in `folder` to its end; returns the seconds to its first step."""
    began = time.monotonic()
    run = start(command, folder=folder, processes=processes)
    run.wait_until(lambda: bool(read_metrics(folder / "metrics.jsonl")))
    start_s = time.monotonic() - began
    finish(run)
    return start_s


def start(command: Sequence[str], *, folder: Path, processes: int = 1) -> Run:
    """Start `command` with `folder` as its run folder, its messages beside it."""
    return Run([*command, f"loop.output_dir={folder}"], log=folder.with_suffix(".log"), processes=processes)


def finish(run: Run) -> None:
    """Wait for the end, which must be a good one."""
    assert run.wait() == 0, run.text()[-2000:]


def newest(checkpoints: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*[0-9]")), default=0)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run has computed, to the bit."""
    last = read_meta(folder / f"checkpoints/step-{newest(folder / 'checkpoints'):08d}")
    return {
        "metrics": computed_metrics(folder),
        "weights, optimizer state or average": last["files"],
        "data state": last["state"]["data"],
        "model": sha256_of(folder / "model/model.safetensors"),
    }


def computed_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what measures the machine or counts since the process started."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(NOT_COMPUTED)} for row in rows]


def long_run(phase: str, inputs: Path, *, steps: int) -> list[str]:
    """Command line of a tiny run of so many steps, with frequent saves and an average of the weights."""
    options = [f"loop.max_steps={steps}", "loop.save_every_steps=2", "optimizer.ema_decay=0.9"]
    if phase == "um3":
        (inputs / "texts").mkdir(exist_ok=True)
        (inputs / "texts/readme.txt").write_text((ROOT / "README.md").read_text())
        options += [f"data.texts=[{{name: readme, path: {inputs}/texts}}]"]
    return arguments(phase, inputs, *options)


def survive(command: Sequence[str], folder: Path, *, kills: int, seed: int, processes: int = 1) -> list[int]:
    """The undisturbed run of `command` in `folder`/whole, the killed one in `folder`/killed, and their comparison.

    Returns the newest checkpoint's step at each kill.
    """
    start_s = whole_run(command, folder=folder / "whole", processes=processes)
    moments = random_moments(kills, seed=seed)
    steps = killed_run(command, folder=folder / "killed", moments=moments, start_s=start_s, processes=processes)
    compare(folder / "whole", folder / "killed")
    return steps


def compare(whole: Path, killed: Path) -> None:
    """Both runs have computed the same, to the bit (AssertionError: what differs)."""
    before, after = outcome(whole), outcome(killed)
    for what in before:
        assert after[what] == before[what], f"{killed} has other {what} than {whole}"


def main() -> None:
    """Make the inputs, then every phase with every number of processes."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.survive", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each run (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    given = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's sums are not the same to the bit
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        for phase, processes in itertools.product(given.phases, given.processes):
            began = time.monotonic()
            command = long_run(phase, folder / "inputs", steps=STEPS_PER_KILL * given.kills)
            at = survive(
                command, folder / f"{phase}-{processes}", kills=given.kills, seed=given.seed, processes=processes
            )
            print(
                f"{phase}, {processes} process(es): {given.kills} kills, then the same bits as undisturbed after "
                f"{STEPS_PER_KILL * given.kills} steps ({time.monotonic() - began:.0f} s; checkpoints at the kills: "
                f"{', '.join(map(str, at))})",
                flush=True,
            )


def make_inputs(folder: Path) -> None:
    """A tiny stage 1, stage 2 and codes, for the phases that need them."""
    for phase in ("stage1", "stage2"):
        finish(Run(arguments(phase, folder), log=folder / f"{phase}.log"))
    images = "images=[{name: scenes, kind: scenes, length: 64}]"
    options = [f"visual_tokenizer={folder}/stage2/model", f"output_dir={folder}/codes", images, "num_threads=1"]
    config = ["--config", str(ROOT / "configs/demo.yaml")]
    subprocess.run(
        [sys.executable, "-m", "data_mix.codes.encode", *config, *options], cwd=ROOT, env=environment(), check=True
    )


if __name__ == "__main__":
    main()
