"""`python -m benchmarks llava`: training steps of LLaVA-1.5 on QLIP-L-14-392, in one process.

The recipe and engine of `python -m train llava-instruct`, on questions about scenes, without its loop, whose checkpoint
of a 7B model has 81 GB. The model that it starts from is written to a temporary folder (TMPDIR; 27 GB), with random
weights in bf16: a Llama of Vicuna-7B's shape, or of --shape, and a QLIP of the config's size, changed by --tower.

One GPU: `engine.offload_optimizer=true loop.batch_size=32`. DeepSpeed then holds 18 bytes a parameter in host memory,
122 GB in all; a third is pinned, in blocks that are rounded up to powers of two.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import harness
from benchmarks.um3_training import add_model_options, read_shape, write_base, write_qlip
from train.settings.llava import LlavaInstructConfig
from train.settings.tokenizer import Stage1Config
from um3.core.commands import find_config, positive
from um3.core.config import load_config
from um3.core.metrics import commit, machine, versions

VICUNA = dict(hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008, vocab_size=32_000)
POSITIONS = 4096


def main(arguments: Sequence[str]) -> None:
    """Write the model, take the steps, print a line and all numbers as JSON."""
    parser = harness.benchmark_parser("llava", __doc__)
    parser.add_argument("--steps", type=positive, default=3, help="measured steps (default 3)")
    parser.add_argument("--warmup", type=positive, default=1, help="steps before them (default 1)")
    parser.add_argument("--tower", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage1.model")
    how: Any = {"shape": VICUNA, "sides": ("model", "steps")}
    add_model_options(parser, config="llava_qlip_l14_392", section="llava-instruct", **how)
    options = parser.parse_intermixed_args(arguments)
    if options.side == "model":
        write_model(options)
    elif options.side == "steps":
        print(json.dumps(measure(options)))
    else:
        with harness.temporary_folder() as name:
            command = [*arguments, "--folder", name]
            inputs = ["benchmarks", "llava", *command, "--side", "model"]
            harness.run_process(inputs, label="llava: a model with random weights")
            numbers = harness.run_side("llava", command, side="steps", label=f"{options.steps} steps")
        seconds, gpu_gib = fmean(numbers["step_s"]), numbers["peak_gpu_gib"]
        memory = ""
        if gpu_gib is not None:
            memory = f"peak GPU memory (torch) {gpu_gib:.2f} GiB, pinned {numbers['pinned_gib']:.2f}, "
        print(
            f"LLaVA of {numbers['parameters']:,} parameters: {seconds:.3g} s a step of {numbers['batch_size']} "
            f"conversations, {numbers['samples_per_s']:.3g} a second; {memory}peak resident memory "
            f"{numbers['peak_host_gib']:.2f} GiB"
        )
        print(json.dumps(numbers | {"commit": commit(), "machine": machine(), "versions": versions()}))


def write_model(options: argparse.Namespace) -> None:
    """Write language/, qlip/ and, from them, model/ into the folder."""
    import torch

    from downstream.llava.modeling import build_llava, save_options, save_weights
    from train.engine import check_engine

    config = _read_settings(options)
    check_engine(config.engine, optimizer=config.optimizer)
    folder, dtype = Path(options.folder), torch.bfloat16
    shape = read_shape(options.shape, default=VICUNA)
    how: Any = {"dtype": dtype, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False}
    write_base(folder / "language", shape=shape, **how)
    tower = [f"model.{setting}" for setting in options.tower]
    stage1 = load_config(Stage1Config, path=find_config(options.config), section="stage1", overrides=tower)
    write_qlip(folder / "qlip", size=replace(stage1.model, encoder_weights=""))
    llava = build_llava(language_model=folder / "language", visual_tokenizer=folder / "qlip", dtype=dtype)
    (folder / "model").mkdir()
    save_options(folder / "model", llava, dtype=dtype)
    save_weights(folder / "model", llava.model.state_dict().items(), dtype=dtype)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every measured step, and the peaks of memory (GiB); `pinned_gib` may count as resident or not."""
    import torch

    from train.engine import start_runtime
    from train.recipes.llava import LlavaTask
    from um3.core.progress import peak_gpu_memory_gib, peak_memory_gib

    config, steps = _read_settings(options), options.warmup + options.steps
    start_runtime(config.loop)
    task = LlavaTask(config)
    parameters = sum(parameter.numel() for parameter in task.objective.parameters())
    task.build_engines()
    times = []
    for step in range(steps):
        start = harness.now()
        loss = task.train_step(step)["train/loss"]
        times.append(harness.now() - start)
    task.batches.close()
    pinned = torch.cuda.host_memory_stats() if torch.cuda.is_available() else {}
    return {
        **{"step_s": times[options.warmup :], "batch_size": config.loop.batch_size, "parameters": parameters},
        **{"samples_per_s": config.loop.batch_size / fmean(times[options.warmup :]), "loss": loss},
        **{"peak_gpu_gib": peak_gpu_memory_gib(), "peak_host_gib": peak_memory_gib()},
        **{"pinned_gib": pinned.get("allocated_bytes.peak", 0) / 2**30, "zero_stage": config.engine.zero_stage},
        **{"offload_optimizer": config.engine.offload_optimizer},
    }


def _read_settings(options: argparse.Namespace) -> LlavaInstructConfig:
    settings = [*options.overrides, f"init_from={options.folder}/model", f"loop.output_dir={options.folder}/run"]
    settings += [f"loop.max_steps={options.warmup + options.steps}"]
    settings += ["data.conversations=[{name: scenes, kind: scenes}]"]
    path = find_config(options.config)
    return load_config(LlavaInstructConfig, path=path, section="llava-instruct", overrides=settings)
