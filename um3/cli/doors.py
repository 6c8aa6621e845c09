"""`um3 train`, `um3 codes`, `um3 eval` and so on: what the targets of the Makefile start, and `um3 demo`, all of them.

A command becomes `python -m ROOM ...` in this process, so its options, messages and exit codes are those of the room.
"""

import os
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from um3.cli import options
from um3.core.commands import PROGRAM

DOORS = {
    "train": ("train", "Train a phase: um3 train stage1 --config demo --run runs/mine."),
    "init": ("train um3-init", "Make a starting UM3 from a Llama or Qwen and a QLIP."),
    "codes": ("data_mix encode", "Encode images to code shards."),
    "eval": ("eval run", "Evaluate a run or a model."),
    "report": ("eval report", "Compare runs with the paper: tables and figures."),
    "benchmark": ("eval", "Run a published benchmark, or an ablation."),
    "plan": ("train plan", "What fits which GPUs, and how long training takes."),
    "check": ("train check", "Verify the shards, caches and checkpoints of a run."),
    "mix-preview": ("data_mix mix-preview", "Plot the data mix of a config."),
    "questions": ("data_mix questions", "Write questions about scenes and digits as files."),
}
"""Command of `um3` -> arguments of `python -m`, and its line in the list of commands."""
IN_RUN = {
    "train stage1": "loop.output_dir=@/stage1",
    "train stage2": "loop.output_dir=@/stage2 init_from=@/stage1/model",
    "data_mix encode": "visual_tokenizer=@/stage2/model output_dir=@/codes",
    "train um3": "loop.output_dir=@/um3 visual_tokenizer=@/stage2/model data.codes=@/codes",
    "train um3-instruct": "loop.output_dir=@/um3-instruct init_from=@/um3/model data.codes=@/codes",
    "train llamagen": "loop.output_dir=@/llamagen visual_tokenizer=@/stage2/model data.codes=@/codes",
    "train text-features": "text_features=@/text_features visual_tokenizer=@/stage2/model data.codes=@/codes",
    "train llava-align": "loop.output_dir=@/llava-align visual_tokenizer=@/stage2/model",
    "train llava-instruct": "loop.output_dir=@/llava-instruct init_from=@/llava-align/model",
    "train um3-init": "loop.output_dir=@/um3-init visual_tokenizer=@/stage2/model",
    "eval run": "run=@",
    "data_mix mix-preview": "--out @/mix.png data.codes=@/codes",
    "train check": "@",
}
"""The words that `--run FOLDER` stands for; @ is the folder. tests/test_makefile.py compares them with the Makefile."""
OWN_DATA = {
    "DATA": (
        "data.sources=[{name: data, path: '${oc.env:DATA}'}]",
        "images=[{name: data, path: '${oc.env:DATA}'}]",
    ),
    "TEXT": ("data.texts=[{name: text, path: '${oc.env:TEXT}'}]", "texts=[{name: text, path: '${oc.env:TEXT}'}]"),
}
"""The settings of own images and texts; a phase takes those that it has."""
OWN_IMAGES = "own_images"
"""The experiment for own images, for which `train own-images` chooses the steps."""
DEMO = ("train stage1", "train stage2", "data_mix encode", "train um3", "eval run")


def enter(name: str, line: str, arguments: Sequence[str]) -> None:
    """Become `python -m LINE ARGUMENTS` under the name of `um3 NAME`, with `--run FOLDER` as its settings."""
    if " " not in line and arguments and not arguments[0].startswith("-"):
        name, line, arguments = f"{name} {arguments[0]}", f"{line} {arguments[0]}", arguments[1:]
    environment = _environment() | {PROGRAM: f"um3 {name}"}
    if line in IN_RUN:
        parser = ArgumentParser(f"um3 ({line})", add_help=False, allow_abbrev=False)
        parser.add_argument("--run")
        given, arguments = parser.parse_known_args(arguments)
        if given.run is not None:
            environment["RUN"] = given.run
            arguments = [*_run_settings(line, run=given.run), *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *line.split(), *arguments], environment)


def _run_settings(line: str, *, run: str) -> list[str]:
    """The words of a line of IN_RUN. Settings name the environment's RUN: a config then reads any path as it stands."""
    return [word.replace("@", "${oc.env:RUN}" if "=" in word else run) for word in IN_RUN[line].split()]


def _environment() -> dict[str, str]:
    """Ours, with the rooms of this um3 first on Python's path: no train.py in the current folder hides `train`."""
    package = Path(__file__).parents[1]
    rooms = package / "_rooms" if (package / "_rooms").is_dir() else package.parent
    paths = [str(rooms), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def _open(name: str, line: str, summary: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

    @options.app.command(name, short_help=summary, context_settings=settings, add_help_option=False)
    def door(context: typer.Context) -> None:
        enter(name, line, context.args)


for name, (line, summary) in DOORS.items():
    _open(name, line, summary)


@options.command(
    "Run the whole pipeline, from nothing to a report.", "um3 demo", "um3 demo --run runs/mine --data path/to/images"
)
def demo(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, such as um3.loop.max_steps=60."),
    ] = None,
    *,
    run: Annotated[str, typer.Option(help="Folder of the run; by default runs/ and the config's name.")] = "",
    config: Annotated[
        str,
        typer.Option(help="Experiment, a name in configs/ or a YAML file: demo, or own_images with --data."),
    ] = "",
    data: Annotated[str, typer.Option(help="Images with captions: a folder, parquet, tar files or a hub id.")] = "",
    text: Annotated[str, typer.Option(help="Texts: a folder of .txt, a .jsonl, a parquet file or a hub id.")] = "",
    minutes: Annotated[float, typer.Option(help="Time for own images, without which the steps are the config's.")] = 60,
    processes: Annotated[int, typer.Option(min=1, help="Training processes, such as one for each GPU.")] = 1,
) -> None:
    """Train a tokenizer, encode the images, train a UM3, evaluate both and write a report (minutes on a CPU).

    The same as `make demo`: a command that is repeated resumes where it stopped.
    """
    from um3.core.commands import find_config

    config = config or (OWN_IMAGES if data else "demo")
    path = find_config(config)
    run = run or f"runs/{path.stem.replace(' ', '-')}"
    inputs = {name: value for name, value in (("DATA", data), ("TEXT", text)) if value}
    shared = [*(setting for name in inputs for setting in OWN_DATA[name]), *(settings or [])]
    environment = _environment() | {"RUN": run} | inputs
    _call(["train", "settings", "--config", str(path), *shared], environment)
    if config == OWN_IMAGES:
        chosen = f"{run}/{OWN_IMAGES}.yaml"
        shared = [setting for setting in shared if setting not in OWN_DATA["DATA"]]
        words = ["--config", str(path), "--sources", OWN_DATA["DATA"][0].partition("=")[2], "--out", chosen]
        words += ["--minutes", str(minutes), "--processes", str(processes)]
        _call(["train", "own-images", *words, *shared], environment)
        path = Path(chosen)
    for line in DEMO:
        training = ["--processes", str(processes)] if line.startswith("train ") else []
        words = [*line.split(), *training, "--config", str(path), *_run_settings(line, run=run)]
        _call([*words, "--shared", *shared], environment)
    _call(["eval", "report", "--run", run], environment)


def _call(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `python -m WORDS` to its end; exit with its code if that is not 0, and after a signal."""
    child = subprocess.Popen([sys.executable, "-m", *words], env=environment)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # the terminal sends Ctrl-C to both
            child.send_signal(number)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for number, handler in earlier.items():
        signal.signal(number, handler)
    if received or code:
        sys.exit(128 + received[0] if received else code)
