"""`python -m benchmarks safety`: what the safety nets of UM3's training cost, as a share of its time.

The phase `um3` runs a few steps on made inputs, at the sizes of the demo and of SmolLM2-135M, with a clock around every
net: saving, the guard against losses that are not finite, gradient norm, metrics, text validation, fingerprints. A
net's share, by the clock and in CPU time, is its shortest time in the steps it runs in, divided by the config's steps
between two such and by the shortest step. For the paper's config, the time of a save follows from the size of its
checkpoint and the CPU time here.
"""

import argparse
import importlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.um3_training import write_inputs
from train.settings.um3 import UM3Config
from um3.core.commands import find_config
from um3.core.config import load_config
from um3.core.files import read_json

SMOLLM2 = dict(hidden_size=576, layers=30, heads=9, kv_heads=3, intermediate_size=1536, vocab_size=49_152)
PAPER, PAPER_GPUS, PAPER_GPU = "um3_llama3_1b", 64, "h200"
DISKS_GB_S = (1, 5)
GB = 1e9
LIMIT = 0.02
"""A share above which a save should run beside the training."""


class Size(NamedTuple):
    """A config, the measured steps, and settings with the {folder} of the inputs."""

    config: str
    steps: int
    settings: Sequence[str] = ()


SIZES = {
    "demo": Size("demo", steps=60),
    "smollm2": Size("um3_smollm2", steps=4, settings=["model.base_model={folder}/base", "model.qk_norm=false"]),
}
CLOCKS = {
    "step": ["train.recipes.um3:UM3Task.train_step"],
    "save": ["train.loop:save_checkpoint", "train.loop:remove_old"],
    "save: write": ["train.checkpoint:save_file"],
    "save: sync": ["um3.core.files:_sync"],
    "save: hash": ["train.checkpoint:sha256_of"],
    "guard": ["train.recipes.um3:check_finite"],
    "stop requests": ["train.loop:any_rank"],
    "gradient norm": [
        "torch.nn.utils:get_total_norm",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
    ],
    "mix statistics": ["train.recipes.um3:UM3Task._mix_metrics", "train.recipes.um3:UM3Task._loss_metrics"],
    "metrics.jsonl": ["um3.core.metrics:MetricsWriter.log", "train.loop:_memory"],
    "text validation": ["train.recipes.text_validation:TextValidation.measure"],
    "fingerprints": ["train.loop:data_fingerprints", "train.recipes.um3:UM3Task.fingerprints"],
    "done.json": [f"train.loop:{name}" for name in ("result_files", "write_record", "commit", "versions", "machine")],
}
"""By net, the functions that it consists of, as MODULE:NAME."""
Seconds = dict[int, list[float]]
"""By the number of steps taken before: seconds by the clock, and of CPU time."""
PARTS_OF_SAVE = [net for net in CLOCKS if net.startswith("save: ")]


def main(arguments: Sequence[str]) -> None:
    """Run the sizes, print one line for each net, then all numbers as JSON."""
    parser = harness.benchmark_parser("safety", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=harness.positive, help="measured steps, an even number (default 60 and 4)")
    parser.add_argument("--side", choices=("inputs", *SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the um3 section")
    options = parser.parse_intermixed_args(arguments)
    if options.side == "inputs":
        shape = SMOLLM2 if "smollm2" in options.sizes else {}
        write_inputs(Path(options.folder), shape=shape, patches=16, bits=12, caption_tokens=24)
    elif options.side:
        run_timed(SIZES[options.side], options=options)
    else:
        with harness.temporary_folder() as name:
            command = [*arguments, "--folder", name]
            inputs = ["benchmarks", "safety", *command, "--side", "inputs"]
            harness.run_process(inputs, label="safety: synthetic model and data")
            results = {
                side: harness.run_side("safety", command, side=side, label=f"{side}, timed") for side in options.sizes
            }
        for side, result in results.items():
            report(side, result)
        if "smollm2" in results:
            results["paper"] = paper(results["smollm2"])
        print(json.dumps(results))


def run_timed(size: Size, *, options: argparse.Namespace) -> None:
    """Run the phase with every function of CLOCKS timed; print the result as JSON."""
    from train import phase

    steps, folder = options.steps or size.steps, Path(options.folder)
    output_dir = folder / size.config
    settings = [setting.format(folder=folder) for setting in size.settings]
    settings += [f"visual_tokenizer={folder}/qlip", f"data.codes={folder}/codes", f"loop.output_dir={output_dir}"]
    settings += [f"loop.max_steps={steps}", f"loop.save_every_steps={steps // 2}", "loop.log_every_steps=1"]
    settings += [f"text_validation.every_steps={steps // 2}", *options.overrides]
    seconds: dict[str, Seconds] = {net: defaultdict(lambda: [0.0, 0.0]) for net in CLOCKS}
    for net, functions in CLOCKS.items():
        for function in functions:
            time_function(function, seconds=seconds[net], step=seconds["step"])
    phase.main(["um3", "--config", size.config, *settings])
    for net in PARTS_OF_SAVE:  # the model's files are written and synced too
        seconds[net] = {step: seconds[net][step] for step in seconds["save"]}
    checkpoint = max((output_dir / "checkpoints").glob("step-*"))
    config = load_config(UM3Config, path=find_config(size.config), section="um3")
    result: dict[str, Any] = {
        net: [min(times) for times in zip(*by_step.values(), strict=True)]
        for net, by_step in seconds.items()
        if by_step
    }
    result["bytes"] = sum(path.stat().st_size for path in checkpoint.iterdir())
    result["peak_gib"] = read_json(output_dir / "done.json")["peak_memory_gib"]
    print(json.dumps(result | {"every": every_steps(config)}))


def time_function(path: str, *, seconds: Seconds, step: Seconds) -> None:
    """Replace MODULE:NAME by a function that adds its time to that of the current step, by the steps taken so far."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = names.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        start, start_cpu, number = time.perf_counter(), time.process_time(), len(step)
        try:
            return function(*arguments, **options)
        finally:
            seconds[number][0] += time.perf_counter() - start
            seconds[number][1] += time.process_time() - start_cpu

    setattr(owner, name, timed)


def every_steps(config: UM3Config) -> dict[str, int]:
    """Steps between two runs of the nets that do not run in every step."""
    loop = config.loop
    rare = {"metrics.jsonl": loop.log_every_steps, "text validation": config.text_validation.every_steps}
    saves = {net: loop.save_every_steps for net in ("save", *PARTS_OF_SAVE)}
    return rare | saves | dict.fromkeys(("fingerprints", "done.json"), loop.max_steps)


def report(side: str, result: dict[str, Any]) -> None:
    """Print a line for the size and one for each net."""
    (step_s, step_cpu_s), gigabytes = result["step"], result["bytes"] / GB
    rate = gigabytes / result["save"][0]
    print(
        f"{side}: {step_s:.4g} s a step, {step_cpu_s:.4g} of CPU time, peak {result['peak_gib']:.2f} GiB, "
        f"checkpoint of {gigabytes:.3g} GB at {rate:.2g} GB/s"
    )
    for net in CLOCKS:
        if net != "step" and net in result:
            every, (net_s, net_cpu_s) = result["every"].get(net, 1), result[net]
            print(
                f"  {net:16} {1000 * net_s:9.2f} ms, {1000 * net_cpu_s:9.2f} of CPU time, every {every:5} steps: "
                f"{net_s / every / step_s:7.3%}, {net_cpu_s / every / step_cpu_s:7.3%} in CPU time"
            )


def paper(result: dict[str, Any]) -> dict[str, Any]:
    """Print and return the time of the paper's save on disks of `DISKS_GB_S`, with the other rates of `result`."""
    from train.checkpoint import FILE_BYTES
    from train.plan.plan import MFU, open_plan

    config = load_config(UM3Config, path=find_config(PAPER), section="um3")
    plan = open_plan(config, devices=PAPER_GPUS, gpu=PAPER_GPU)
    setting, size = plan.own(), 12 * sum(plan.parameters)  # float32 weights and two moments
    assert setting is not None
    between_s = config.loop.save_every_steps * plan.step_seconds(setting, mfu=MFU)
    # CPU time, as the disk is another.
    saved_s, *parts_s = (result[net][1] / result["bytes"] for net in ("save", *PARTS_OF_SAVE))
    gathered_s, (written_s, _, hashed_s) = saved_s - sum(parts_s), parts_s
    numbers: dict[str, Any] = {"bytes": size, "seconds_between_saves": between_s}
    for rate in DISKS_GB_S:
        # Files are hashed beside the gathering, but for the last.
        save_s = size * (gathered_s + written_s + 1 / rate / GB) + FILE_BYTES * hashed_s
        numbers[f"share_at_{rate}_gb_s"] = save_s / between_s
        print(
            f"paper: {size / GB:.3g} GB to a disk of {rate} GB/s: {save_s:.1f} s (gather {size * gathered_s:.1f}, "
            f"write {size * written_s:.1f}, last hash {FILE_BYTES * hashed_s:.1f}) every {between_s:.0f} s on "
            f"{PAPER_GPUS} x {PAPER_GPU}: {save_s / between_s:.2%} (limit {LIMIT:.0%})"
        )
    return numbers
