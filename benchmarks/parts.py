"""`python -m benchmarks gpu-proof` and `python -m benchmarks all`: many benchmarks, with one page of results.

gpu-proof runs the GPU tests and every benchmark at the paper's sizes (gpu_proof.yaml); --small runs its parts at the
size of a test, on a CPU too. all runs every benchmark at a small size on a CPU (all.yaml), always anew.

Each part is a process of its own. What it prints is added to results.jsonl as it ends, so neither a failure nor the
time limit loses another part; the same gpu-proof runs what is missing. Nothing is downloaded: weights and data are
made.
"""

import argparse
import functools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import benchmark_parser, run_process
from train.plan.plan import GPUS
from um3.core.commands import positive
from um3.core.errors import UserError
from um3.core.files import folder_lock, parse_json, write_text
from um3.core.metrics import commit, machine, versions

RUNS = {"gpu-proof": (20, "runs/gpu-proof"), "all": (10, "runs/benchmarks")}
"""By command: minutes, and the folder of its results."""
MIN_S = 10
"""No part starts with fewer seconds left."""


@dataclass
class Part:
    """A command with its arguments, at full size and for a test (empty: not run then).

    `goals` are least values of its printed numbers, or ranges [least, greatest]; `figure` is a regular expression of
    what a table shows of its printed lines.
    """

    name: str
    command: str
    arguments: str
    limit_s: float = math.inf
    small: str = ""
    figure: str = ""
    goals: dict[str, float | list[float]] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> None:
    """Run the parts of the command that `arguments` starts with, and rewrite the page after each.

    UserError, after all parts, if some have failed or not run.
    """
    name, *arguments = arguments
    minutes, out = RUNS[name]
    rows = yaml.safe_load(Path(__file__).with_name(f"{name.replace('-', '_')}.yaml").read_text())
    parts = {row["name"]: Part(**row) for row in rows}
    parser = benchmark_parser(name, __doc__)
    parser.add_argument("--out", default=out, help=f"folder of results and page (default {out})")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), metavar="NAME", help="default: all")
    parser.add_argument("--minutes", type=positive, default=minutes, help=f"limit of all together (default {minutes})")
    parser.set_defaults(small=False)
    if name == "gpu-proof":
        parser.add_argument("--small", action="store_true", help="at the size of a test, on a CPU too")
    options = parser.parse_args(arguments)
    device = device_name()
    if name == "gpu-proof" and not device and not options.small:
        raise UserError("torch finds no GPU; --small runs the parts at the size of a test")
    chosen = [parts[part] for part in options.parts if parts[part].small or not options.small]
    with folder_lock(options.out):
        if name == "all":
            Path(options.out, "results.jsonl").unlink(missing_ok=True)
        results = run_parts(chosen, device=device, options=options)
    print("\n".join(summary(chosen, results=results)))
    print(Path(options.out, "page.md"))
    failed = [part.name for part in chosen if results.get(part.name, {}).get("status") != "done"]
    if failed:
        raise UserError(f"{len(failed)} of {len(chosen)} parts failed or did not run: {', '.join(failed)}")


def run_parts(parts: Sequence[Part], *, device: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the parts that have no result yet while there is time; the results by name."""
    out, end = Path(options.out), time.monotonic() + 60 * options.minutes
    results = read_results(out / "results.jsonl", small=options.small)
    for part in parts:
        limit_s = end - time.monotonic()
        if not options.small:
            limit_s = min(part.limit_s, limit_s)
        if results.get(part.name, {}).get("status") != "done" and limit_s >= MIN_S:
            result = run(part, device=device, small=options.small, limit_s=limit_s)
            with (out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            results[part.name] = result
        if part.name not in results:
            print(f"{part.name}: not run, the time is over", flush=True)
            continue
        write_text(out / "page.md", page([done for done in parts if done.name in results], results=results))
        print(f"{part.name}: {results[part.name]['status']}", flush=True)
    return results


def summary(parts: Sequence[Part], *, results: dict[str, dict[str, Any]]) -> list[str]:
    """A table in Markdown: seconds and figures of every part that has run."""
    lines = ["| part | seconds | figures |", "|---|---|---|"]
    for part in parts:
        if result := results.get(part.name):
            printed = "\n".join(line for line in result["lines"] if not line.startswith("{"))
            figures = re.findall(part.figure, printed) if part.figure else []
            shown = "; ".join(figures) if result["status"] == "done" else result["status"]
            lines.append(f"| {part.name} | {result['seconds']:.0f} | {shown} |")
    return lines


def device_name() -> str:
    """The GPU's name, empty without one. Another process is asked, so that this one stays small (`run_process`)."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def read_results(path: Path, *, small: bool) -> dict[str, dict[str, Any]]:
    """The last result of each part at this size."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [parse_json(line, where=path, keys=["part", "small", "status"]) for line in lines]
    return {row["part"]: row for row in rows if row["small"] == small}


def run(part: Part, *, device: str, small: bool, limit_s: float) -> dict[str, Any]:
    """A part's result: status (done, or what went wrong), printed lines and numbers, seconds, and where it ran."""
    text = part.small if small else part.arguments.replace("{peak}", peak_option(device))
    command, start = [*part.command.split(), *shlex.split(text)], time.monotonic()
    status, lines = "done", list[str]()
    try:
        lines = [line for line in run_process(command, label=part.name, limit_s=limit_s).splitlines() if line.strip()]
    except UserError as error:
        status = str(error)
    numbers = [json.loads(line) for line in lines if line.startswith("{")]
    about = {"device": device or "CPU", "commit": commit(), "machine": machine(), "versions": versions()}
    result = {"part": part.name, "small": small, "status": status, "seconds": time.monotonic() - start}
    return result | {"command": command, "lines": lines, "numbers": numbers} | about


def peak_option(device: str) -> str:
    """--peak-tflops of the device's data sheet; empty for a device without one here, whose peak is then measured."""
    words = re.findall(r"\w+", device.lower().replace("rtx ", "rtx"))
    rates = [gpu.bf16_tflops for name, gpu in GPUS.items() if name != "cpu" and name.partition("-")[0] in words]
    return f"--peak-tflops {rates[0]}" if rates else ""


def page(parts: Sequence[Part], *, results: dict[str, dict[str, Any]]) -> str:
    """A table of what the goals ask, then each part's command and lines."""
    about = results[parts[0].name]
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version != "absent")
    cores = f"{about['machine']['platform']}, {about['machine']['cpu_cores']} CPU cores"
    lines = [f"# Benchmarks: {about['device']}, {time.strftime('%d %B %Y')}", "", f"Commit {about['commit']}. {cores}."]
    lines += [packages + ".", "", *summary(parts, results=results)]
    if any(part.goals for part in parts):
        lines += ["", "| part | quantity | reached | goal |", "|---|---|---|---|"]
    for part in parts:
        for key, goal in part.goals.items() if results[part.name]["status"] == "done" else ():
            for numbers in results[part.name]["numbers"]:
                what = " ".join(str(word) for word in (numbers.get("variant", ""), key.replace("_", " ")) if word)
                reached = functools.reduce(lambda value, name: value[name], key.split("."), numbers)
                lines.append(f"| {part.name} | {what} | {reached:.2f} | {goal} |")
    for part in parts:
        result = results[part.name]
        lines += ["", f"## {part.name}", "", f"`python -m {shlex.join(result['command'])}`", ""]
        printed = [line for line in result["lines"] if not line.startswith("{")]
        lines += ["```", *printed, f"{result['status']}, {result['seconds']:.0f} s", "```"]
    return "\n".join(lines) + "\n"
