"""`python -m benchmarks um3-training`: a training step of UM3, and of the same model in transformers' Trainer.

Ours is the real `python -m train um3` on data of the real formats made on the spot: a Llama of the given shape with
random weights and 128,256 entries, codes of 256 patches of 28 bits, captions of 64 tokens, text that fills its rows.
Stock is `transformers.Trainer` on the model that ours has left and on the very same rows, with the loss of
`model(input_ids, labels)`. A step's time has everything in it but the first steps, which are warm-up. Utilisation is
model FLOPs (formula: `train/plan/plan.py`) as a share of what large matrix products reach, or of `--peak-tflops`.

One card of the paper's size: `--config configs/paper loop.batch_size=64 data.packing=documents`; add
`--shape width=512 layers=4` and smaller rows for a CPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.peak import Peak, measure_peak
from benchmarks.runs import Run, check_positive, provenance, run_apart, temporary_folder, train_phase
from benchmarks.training import step_seconds
from train.config import UM3Config
from um3.core.config import load_config
from um3.core.errors import UserError

ENTRIES = 128_256
PATCHES = 256
CAPTION_TOKENS = 64
SHAPES = {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate_size": 8192, "entries": ENTRIES}
"""Llama-3.2-1B's."""
IMAGES, DOCUMENTS, DOCUMENT_TOKENS = 512, 64, 20_000


def main(arguments: Sequence[str]) -> None:
    """Run ours, then stock; print a line for each and all numbers as JSON."""
    options = _options(arguments)
    if options.one:
        print(json.dumps(measure_stock(options)))
        return
    command = ["benchmarks", "um3-training", *arguments]
    with temporary_folder() as name:
        folder = Path(name)
        run_apart([*command, "--one", "inputs", "--folder", name], label="making model and data")
        settings = [f"model.base_model={folder}/base", f"visual_tokenizer={folder}/qlip", f"data.codes={folder}/codes"]
        settings += [f"data.texts=[{{name: made, path: {folder}/texts.jsonl}}]", "text_validation.every_steps=0"]
        steps = options.warmup + options.steps
        ours = train_phase("um3", options=options, steps=steps, folder=folder, settings=settings)
        stock = json.loads(run_apart([*command, "--one", "stock", "--folder", name], label="stock").splitlines()[-1])
        numbers = _report(ours, stock=stock, options=options)
        print(json.dumps(numbers | provenance(ours)))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks um3-training", description=__doc__)
    parser.add_argument(
        "--config",
        default="configs/um3_llama3_1b.yaml",
        help="YAML file of an experiment (default configs/um3_llama3_1b.yaml)",
    )
    parser.add_argument("--shape", nargs="+", default=[], metavar="NAME=NUMBER", help=f"of the base: {SHAPES}")
    parser.add_argument("--steps", type=int, default=50, help="steps that count (default 50)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default 5)")
    parser.add_argument("--peak-tflops", type=float, help="the device's TFLOP/s, in place of a measured one")
    parser.add_argument("--one", choices=("inputs", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of UM3's config")
    options = parser.parse_intermixed_args(arguments)
    check_positive(options, "steps", "warmup")
    options.um3 = []
    shape = dict(SHAPES)
    for each in options.shape:
        key, _, value = each.partition("=")
        if key not in SHAPES or not value.isdigit() or int(value) < 1:
            raise UserError(f"--shape {each}: give {', '.join(SHAPES)} as NAME=NUMBER, at least 1")
        shape[key] = int(value)
    if shape["entries"] < 300 or shape["width"] % shape["heads"] or shape["heads"] % shape["kv_heads"]:
        raise UserError(f"--shape {shape}: 300 entries or more, and heads that divide the width and their groups")
    options.shape = shape
    if options.one == "inputs":
        make_inputs(Path(options.folder), shape=shape)
        sys.exit(0)
    return options


def make_inputs(folder: Path, *, shape: dict[str, int]) -> None:
    """Write base/, qlip/, codes/ and texts.jsonl: random, in the real formats."""
    import numpy as np

    from data_mix.codes.shards import ShardHeader, shard_path, write_shard
    from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
    from tokenizer.modeling import load_qlip
    from train.config import QLIPSizeConfig, TextTowerConfig
    from train.recipes.tokenizer_setup import new_tokenizer, save_tokenizer

    _make_base(folder / "base", shape=shape)
    image_size = 8 * round(PATCHES**0.5)
    size = QLIPSizeConfig(
        image_size=image_size, patch_size=8, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48
    )
    text = TextTowerConfig(
        vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, max_tokens=24
    )
    scenes = open_image_source(ImageSourceConfig(length=64), split="train", size=32, seed=0)
    qlip, processor = new_tokenizer(size, text, sources=[scenes], seed=0)
    save_tokenizer(folder / "qlip", qlip=qlip, processor=processor, weights={})
    fingerprint = load_qlip(folder / "qlip").fingerprint()
    generator, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    write_shard(
        shard_path(folder / "codes", split="train", source="made", shard=0),
        header=ShardHeader(fingerprint, bits=size.bits, image_size=image_size, split="train", source="made"),
        keys=[str(number) for number in range(IMAGES)],
        codes_BN=generator.integers(0, 2**size.bits, (IMAGES, PATCHES)),
        captions=[["".join(generator.choice(letters, CAPTION_TOKENS))] for _ in range(IMAGES)],
    )
    documents = ("".join(generator.choice(letters, DOCUMENT_TOKENS)) for _ in range(DOCUMENTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))


def _make_base(folder: Path, *, shape: dict[str, int]) -> None:
    """A Llama with random weights, whose tokenizer makes a token of every byte and has entries that no text uses."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["entries"],
        hidden_size=shape["width"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    unused = [f"unused{number}" for number in range(shape["entries"] - len(alphabet) - len(specials))]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet + unused)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special) for special in specials])
    marks = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)


def measure_stock(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step of transformers' Trainer but the warm-up, and its peak memory (GiB)."""
    # Of several GPUs it would take all, and share one micro-batch out among them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from data_mix.batches.mix import open_rows
    from data_mix.batches.packing import micro_batches
    from train.engine import split_batch
    from um3.core.progress import peak_gpu_memory_gib, peak_memory_gib
    from um3.model.language_model import load_model

    run = Path(options.folder) / "um3"
    config: UM3Config = load_config(UM3Config, path=run / "config.yaml")
    if config.loop.num_threads:
        torch.set_num_threads(config.loop.num_threads)
    made = load_model(run / "model", dtype=torch.float32)
    rows = open_rows(
        config.data,
        ids=made.ids,
        text_tokenizer=made.text_tokenizer,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        cache=run / "cache",
    )
    _, accumulation = split_batch(config.loop)
    parts: list[dict[str, torch.Tensor]] = []
    for step in range(config.loop.max_steps):
        batch = rows.batch(step)
        for input_ids_BT, target_mask_BT in micro_batches(
            batch.input_ids_BT, batch.target_mask_BT, parts=accumulation, pad_id=made.ids.pad_id
        ):
            parts.append({"input_ids": input_ids_BT, "labels": input_ids_BT.masked_fill(~target_mask_BT, -100)})

    class Parts(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(parts)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return parts[index]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(options.folder) / "stock"),
        per_device_train_batch_size=1,  # of whole micro-batches
        gradient_accumulation_steps=accumulation,
        max_steps=config.loop.max_steps,
        learning_rate=config.optimizer.lr,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=config.engine.activation_checkpointing,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    Trainer(
        model=made.model,
        args=arguments,
        train_dataset=Parts(),
        data_collator=lambda items: items[0],
        callbacks=[clock],
    ).train()
    times = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]
    peak = peak_gpu_memory_gib()
    return {"step_s": times[options.warmup - 1 :], "peak_gib": peak_memory_gib() if peak is None else peak}


def _report(ours: Run, *, stock: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    from train.engine import precision_of
    from train.plan.plan import Plan

    config: UM3Config = load_config(UM3Config, path=ours.folder / "config.yaml")
    precision = precision_of(config.engine)
    times = step_seconds(ours.rows)[options.warmup - 1 :]
    seconds, stock_s = fmean(times), fmean(stock["step_s"])
    plan = Plan(config, devices=1, gpu="cpu")
    flops, _ = plan.step_flops(checkpointing=False)
    peak = (
        Peak(options.peak_tflops * 1e12, "given")
        if options.peak_tflops
        else measure_peak(precision=precision, processes=1, threads=config.loop.num_threads)
    )
    per_step = (_tokens(ours.rows[-1]) - _tokens(ours.rows[options.warmup - 1])) / options.steps
    used = flops / seconds / peak.flops
    print(
        f"ours: {seconds:.3g} s a step of {config.loop.batch_size} samples, {per_step / seconds:,.0f} tokens/s; "
        f"{ours.peak_kind} {ours.peak_gib:.2f} GiB; {flops / 1e12:.3g} TFLOP a step, {used:.1%} of "
        f"{peak.flops / 1e12:.3g} TFLOP/s ({peak.how}, {precision})"
    )
    print(
        f"stock: {stock_s:.3g} s a step, {per_step / stock_s:,.0f} tokens/s; {stock['peak_gib']:.2f} GiB: "
        f"ours is {stock_s / seconds:.2f}x as fast with {ours.peak_gib / stock['peak_gib']:.2f}x the memory"
    )
    return {
        "ours": {"step_s": times, "peak_gib": ours.peak_gib},
        "stock": stock,
        "tokens_per_step": per_step,
        "flops_per_step": flops,
        "peak_flops": peak.flops,
        "peak_how": peak.how,
        "utilisation": used,
        "precision": precision,
        "shape": options.shape,
    }


def _tokens(row: dict[str, Any]) -> float:
    """Tokens that the run has had up to this row, padding not counted."""
    return sum(value for key, value in row.items() if key.startswith(("data/text_tokens/", "data/visual_tokens/")))
