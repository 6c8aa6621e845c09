"""`python -m benchmarks um3-training`: a training step of UM3, and of the same model in transformers' Trainer.

Ours is `python -m train um3` on synthetic data in the real formats: a Llama of the given shape with random weights,
codes of 256 patches of 28 bits, captions of 64 tokens, and long texts. Stock is `transformers.Trainer` on the model
that our run saved and on the same sequences, with the loss of `model(input_ids, labels)`. Utilisation is model FLOPs
(`train.plan`) as a share of what large matrix products reach, or of --peak-tflops. The plan is that of `make plan` for
the same settings, with its default utilisation of the same peak; on a CPU its memory leaves out Python and libraries.

One GPU with the paper's sizes: `--config um3_llama3_1b loop.batch_size=64 data.packing=documents`. For a CPU, add
`--shape hidden_size=512 layers=4` and a smaller data.seq_len.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import harness
from train.settings.tokenizer import QLIPSizeConfig, TextTowerConfig
from train.settings.um3 import UM3Config
from um3.core.config import load_config
from um3.core.distributed import device
from um3.core.errors import UserError

PATCHES, CAPTION_TOKENS = 256, 64
IMAGES, DOCUMENTS, DOCUMENT_TOKENS = 512, 64, 20_000
SHAPE = dict(hidden_size=2048, layers=16, heads=32, kv_heads=8, intermediate_size=8192, vocab_size=128_256)
"""Llama-3.2-1B's."""
SMALL_TOWER: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)


def main(arguments: Sequence[str]) -> None:
    """Run ours, then stock; print a line for each and all numbers as JSON."""
    parser = harness.benchmark_parser("um3-training", __doc__)
    harness.add_step_options(parser, steps=50, warmup=5)
    add_model_options(parser, config="um3_llama3_1b", section="um3", shape=SHAPE, sides=("inputs", "stock"))
    options = parser.parse_intermixed_args(arguments)
    shape = read_shape(options.shape, default=SHAPE)
    if options.side == "inputs":
        write_inputs(Path(options.folder), shape=shape)
    elif options.side == "stock":
        print(json.dumps(measure_stock(options)))
    else:
        with harness.temporary_folder() as name:
            command = [*arguments, "--folder", name]
            inputs = ["benchmarks", "um3-training", *command, "--side", "inputs"]
            harness.run_process(inputs, label="um3-training: synthetic model and data")
            settings = [f"model.base_model={name}/base", f"visual_tokenizer={name}/qlip", f"data.codes={name}/codes"]
            settings += [f"data.texts=[{{name: made, path: {name}/texts.jsonl}}]", "text_validation.every_steps=0"]
            steps = options.warmup + options.steps
            ours = harness.train_phase("um3", options=options, steps=steps, folder=Path(name), settings=settings)
            stock = harness.run_side("um3-training", command, side="stock", label="stock")
            print(json.dumps(_report(ours, stock=stock, options=options) | {"shape": shape} | ours.provenance))


def add_model_options(
    parser: argparse.ArgumentParser, *, config: str, section: str, shape: dict[str, int], sides: Sequence[str]
) -> None:
    """Options of a case that makes its language model: experiment, settings, shape, hidden --side and --folder."""
    parser.add_argument("--config", default=config, help=f"experiment (default {config})")
    parser.add_argument("--shape", nargs="+", default=[], metavar="NAME=NUMBER", help=f"of the language model: {shape}")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings of the {section} section")


def read_shape(settings: Sequence[str], *, default: dict[str, int]) -> dict[str, int]:
    """The `default` with the settings NAME=NUMBER."""
    shape = dict(default)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in shape or not value.isdigit() or int(value) < 1:
            raise UserError(f"--shape {setting}: pass {', '.join(shape)} as NAME=NUMBER, at least 1")
        shape[key] = int(value)
    if shape["vocab_size"] < 300 or shape["hidden_size"] % shape["heads"] or shape["heads"] % shape["kv_heads"]:
        rule = "vocab_size must be at least 300, heads divide hidden_size, and kv_heads divide heads"
        raise UserError(f"--shape {shape}: {rule}")
    return shape


def write_inputs(
    folder: Path, *, shape: dict[str, int], patches: int = PATCHES, bits: int = 28, caption_tokens: int = CAPTION_TOKENS
) -> None:
    """Write base/ (if it has a shape), qlip/, codes/ and texts.jsonl: random content in the real formats."""
    import numpy as np

    from data_mix.codes.shards import ShardHeader, shard_path, write_shard
    from tokenizer.modeling import load_qlip

    if shape:
        write_base(folder / "base", shape=shape)
    image_size = 8 * round(patches**0.5)
    write_qlip(folder / "qlip", size=QLIPSizeConfig(image_size=image_size, patch_size=8, bits=bits, **SMALL_TOWER))
    fingerprint = load_qlip(folder / "qlip").fingerprint()
    generator, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    write_shard(
        shard_path(folder / "codes", split="train", source="made", shard=0),
        header=ShardHeader(fingerprint, bits=bits, image_size=image_size, split="train", source="made"),
        keys=[str(number) for number in range(IMAGES)],
        codes_BN=generator.integers(0, 2**bits, (IMAGES, patches)),
        captions=[["".join(generator.choice(letters, caption_tokens))] for _ in range(IMAGES)],
    )
    documents = ("".join(generator.choice(letters, DOCUMENT_TOKENS)) for _ in range(DOCUMENTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def write_qlip(folder: Path, *, size: QLIPSizeConfig) -> None:
    """A QLIP with random weights and a small text tower."""
    from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
    from train.recipes.tokenizer_setup import new_tokenizer
    from train.recipes.tokenizer_task import save_tokenizer

    scenes = open_image_source(ImageSourceConfig(length=64), split="train", size=32, seed=0)
    text = TextTowerConfig(vocab_size=300, max_tokens=24, **SMALL_TOWER)
    qlip, processor = new_tokenizer(size, text, sources=[scenes], seed=0, cache=folder.parent)
    save_tokenizer(folder, qlip=qlip, processor=processor, weights={})


def write_base(folder: Path, *, shape: dict[str, int], **options: Any) -> None:
    """A Llama with random weights, and its text tokenizer.

    options: of LlamaConfig; a `dtype` is that of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.synthetic import made_text_tokenizer

    torch.manual_seed(0)
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    sizes: dict[str, Any] = {names.get(name, name): number for name, number in shape.items()}
    sizes |= {"dtype": torch.float32, "max_position_embeddings": 131_072, "tie_word_embeddings": True} | options
    with device():  # a GPU draws the weights of a 7B model in a second, a CPU in minutes
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=sizes["dtype"])
    model.save_pretrained(folder)
    made_text_tokenizer(shape["vocab_size"]).save_pretrained(folder)


def measure_stock(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every measured step of transformers' Trainer, and its peak memory (GiB)."""
    # With several GPUs, Trainer would use all of them and split a micro-batch.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from data_mix.batches.mix import SequenceBatches
    from data_mix.batches.packing import micro_batches
    from train.engine import precision_of, split_batch
    from um3.core.progress import peak_gpu_memory_gib, peak_memory_gib
    from um3.model.language_model import load_model

    run, gpu = Path(options.folder) / "um3", torch.cuda.is_available()
    config: UM3Config = load_config(UM3Config, path=run / "config.yaml")
    if config.loop.num_threads:
        torch.set_num_threads(config.loop.num_threads)
    loaded = load_model(run / "model", dtype=torch.float32)
    inputs: Any = {"text_tokenizer": loaded.text_tokenizer, "cache": run / "cache"}
    loop, ids = config.loop, loaded.ids
    mix = SequenceBatches(config.data, ids=ids, batch_size=loop.batch_size, seed=loop.seed, **inputs)
    _, accumulation = split_batch(loop)
    items: list[dict[str, torch.Tensor]] = []
    for batch in map(mix.batch, range(loop.max_steps)):
        parts = micro_batches(batch.input_ids_BT, batch.target_mask_BT, parts=accumulation, pad_id=ids.pad_id)
        for input_ids_BT, target_mask_BT in parts:
            items.append({"input_ids": input_ids_BT, "labels": input_ids_BT.masked_fill(~target_mask_BT, -100)})

    class Clock(TrainerCallback):
        times: list[tuple[float, float]] = []  # noqa: RUF012 - one instance

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append((harness.now(), time.process_time()))

    settings = TrainingArguments(
        output_dir=str(Path(options.folder) / "stock"),
        per_device_train_batch_size=1,  # an item is a micro-batch
        gradient_accumulation_steps=accumulation,
        max_steps=loop.max_steps,
        learning_rate=config.optimizer.lr,
        bf16=precision_of(config.engine) != "fp32",
        use_cpu=not gpu,
        gradient_checkpointing=config.engine.activation_checkpointing,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    Trainer(loaded.model, settings, lambda batch: batch[0], items, callbacks=[clock]).train()
    step_s, step_cpu_s = (
        [later - earlier for earlier, later in itertools.pairwise(times)][options.warmup - 1 :]
        for times in zip(*clock.times, strict=True)
    )
    peak_gib = peak_gpu_memory_gib()
    result: dict[str, Any] = {"step_s": step_s, "step_cpu_s": step_cpu_s}
    return result | {"peak_gib": peak_memory_gib() if peak_gib is None else peak_gib}


def _report(ours: harness.TrainingRun, *, stock: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from train.engine import precision_of
    from train.plan.plan import GIB, MFU
    from train.plan.um3 import UM3Plan

    config: UM3Config = load_config(UM3Config, path=ours.folder / "config.yaml")
    precision, times = precision_of(config.engine), ours.step_seconds(warmup=options.warmup)
    seconds, stock_s = fmean(times), fmean(stock["step_s"])
    cpu_times = ours.step_seconds(warmup=options.warmup, cpu=True)
    cpu_s, stock_cpu_s = fmean(cpu_times), fmean(stock["step_cpu_s"])
    # Any GPU: which one decides on the rate and on what fits, and neither is asked for.
    plan = UM3Plan(config, devices=1, gpu="h100" if torch.cuda.is_available() else "cpu")
    if (setting := plan.own()) is None:
        raise UserError("train.plan refuses the settings of the run; change engine or loop.micro_batch_size")
    flops, repeated_flops = plan.step_flops(checkpointing=setting.checkpointing)
    threads = config.loop.num_threads
    peak = harness.machine_peak(precision=precision, threads=threads, tflops=options.peak_tflops)
    per_step = ours.step_tokens(warmup=options.warmup)
    utilisation = flops / seconds / peak.flops
    planned_s, planned_gib = (flops + repeated_flops) / (MFU * peak.flops), plan.usage(setting).total / GIB
    ratios = {"time": planned_s / seconds, "memory": planned_gib / ours.peak_gib}
    print(
        f"ours: {seconds:.3g} s a step of {config.loop.batch_size} samples, {per_step / seconds:,.0f} tokens/s; "
        f"{ours.peak_kind} {ours.peak_gib:.2f} GiB; {flops / 1e12:.3g} TFLOP a step, {utilisation:.1%} of "
        f"{peak.flops / 1e12:.3g} TFLOP/s ({peak.how}, {precision})"
    )
    print(
        f"stock: {stock_s:.3g} s a step, {per_step / stock_s:,.0f} tokens/s; {stock['peak_gib']:.2f} GiB: "
        f"ours is {stock_s / seconds:.2f}x as fast ({stock_cpu_s / cpu_s:.2f}x in CPU time) with "
        f"{ours.peak_gib / stock['peak_gib']:.2f}x the memory"
    )
    print(
        f"plan: {planned_s:.3g} s a step at {MFU:.0%} of the peak, {planned_gib:.2f} GiB: {ratios['time']:.2f}x the "
        f"time and {ratios['memory']:.2f}x the memory that ours took"
    )
    return {
        **{
            "ours": {"step_s": times, "step_cpu_s": cpu_times, "peak_gib": ours.peak_gib},
            "stock": stock,
            "tokens_per_step": per_step,
        },
        **{"flops_per_step": flops, "peak_flops": peak.flops, "peak_how": peak.how, "utilisation": utilisation},
        **{"precision": precision, "speedup": stock_s / seconds, "cpu_speedup": stock_cpu_s / cpu_s},
        **{"plan_s": planned_s, "plan_gib": planned_gib, "plan_to_measured": ratios},
    }
