"""`python -m benchmarks um3-loss`: a training step of UM3 with the split loss against the stock route.

Stock is transformers' own `model(input_ids, labels)`: logits of every position over the whole vocabulary, and their
cross entropy. Ours is what `python -m train um3` runs (`train.recipes.um3.UM3Objective`). Same Qwen3 with the same weights,
same rows, float32; a step is forward and backward, with `--optimizer` AdamW's step too. Every run is in a process of
its own so that its peak memory is its own; runs alternate, and the fastest of each is compared. A further process holds
our gradients against those of the split loss written plainly over the full logits.

Two kinds of rows, all of them full (nothing is padded) and supervised as in training ("target"). "image": text-to-image
rows with a caption that leaves just the room for the image. "mix": text, image-to-text and text-to-image rows at the
paper's 12:1:3, by exact counts over four batches, as training composes them; a step's time is the mean of the four.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.model import made_model
from benchmarks.runs import check_positive, run_apart
from um3.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from um3.model.vocabulary import UnifiedVocabulary

    Batch = tuple[Tensor, Tensor]  # input_ids_BT, target_mask_BT
    Loss = Callable[[Batch], Tensor]

GOALS = {"image": 3.0, "mix": 1.2}
"""Times faster than stock."""
MEMORY_GOAL, GRADIENT_GOAL = 0.25, 1e-5
MIX_BATCHES = 4
ROW_MARKS = 4  # as data_mix.batches.mix has it, which imports torch


def main(arguments: Sequence[str]) -> None:
    """Measure and print one line per kind of rows, then the numbers as JSON.

    Raises:
        UserError: bad options, or gradients that are not those of the plain split loss.
    """
    options = _options(arguments)
    if options.one:
        print(json.dumps(check(options) if options.one == "check" else measure(options)))
        return
    for kind in options.kinds:

        def apart(one: str, label: str, kind: str = kind) -> dict[str, float]:
            output = run_apart(["benchmarks", "um3-loss", *arguments, "--kinds", kind, "--one", one], label=label)
            found: dict[str, float] = json.loads(output.splitlines()[-1])
            return found

        checked = apart("check", f"{kind}: gradients against the plain split loss")
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
        for repeat in range(options.repeats):
            for one, found in runs.items():
                found.append(apart(one, f"{kind}: run {repeat + 1} of {options.repeats}, {one}"))
        print(_comparison(kind, runs, error=checked["error"]))
        asked = {name: value for name, value in vars(options).items() if name not in ("kinds", "one")}
        print(json.dumps({"kind": kind, **asked, **checked, **runs}))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks um3-loss", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=GOALS, default=list(GOALS), help="rows (default image mix)")
    parser.add_argument("--batch", type=int, default=4, help="rows at a time (default 4)")
    parser.add_argument("--seq-len", type=int, default=1024, help="ids of a row (default 1024)")
    parser.add_argument("--patches", type=int, default=256, help="of an image, two ids each (default 256)")
    parser.add_argument("--width", type=int, default=512, help="of the model (default 512)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    parser.add_argument("--text-vocab-size", type=int, default=128_258, help="of the vocabulary (default 128258)")
    parser.add_argument("--bits-per-subtoken", type=int, default=14, help="of a code; two subtokens (default 14)")
    parser.add_argument("--chunk-tokens", type=int, help="positions that have logits at a time (default: training's)")
    parser.add_argument("--optimizer", action="store_true", help="take AdamW's step as well, state and all")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--one", choices=("ours", "stock", "check"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_positive(options, "batch", "seq_len", "patches", "width", "layers", "text_vocab_size", "bits_per_subtoken")
    check_positive(options, "chunk_tokens", "repeats", "threads")
    if options.bits_per_subtoken > 20:
        raise UserError(f"--bits-per-subtoken is {options.bits_per_subtoken}; at most 20")
    if options.text_vocab_size < 8:
        raise UserError(f"--text-vocab-size is {options.text_vocab_size}; at least 8, five of them are marks")
    shortest = 2 * options.patches + ROW_MARKS + 1
    if options.seq_len < shortest:
        raise UserError(
            f"--seq-len is {options.seq_len}; an image of {options.patches} patches and a caption need {shortest}"
        )
    return options


def _comparison(kind: str, runs: dict[str, list[dict[str, float]]], *, error: float) -> str:
    ours, stock = (min(runs[one], key=lambda run: run["seconds"]) for one in ("ours", "stock"))
    faster = stock["seconds"] / ours["seconds"]
    memory = ours["peak_gib"] / max(stock["peak_gib"], 1e-6)
    return (
        f"{kind}: {ours['seconds']:.2f} s a step, stock {stock['seconds']:.2f}: {faster:.2f}x (goal {GOALS[kind]}x); "
        f"memory beside the model {ours['peak_gib']:.2f} GiB, stock {stock['peak_gib']:.2f}: {memory:.2f}x "
        f"(goal {MEMORY_GOAL}x); "
        f"gradients within {error:.0e} of the plain split loss (goal {GRADIENT_GOAL:.0e})"
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step after a warm-up on one row, and the peak memory beside the model, gradients included (GiB).

    `cpu_s`, of all threads, tells more than `seconds` where others use the machine.
    """
    import torch

    from um3.core.progress import peak_memory_gib

    model, ids, batches = _build(options)
    loss = _ours(model, ids=ids, options=options) if options.one == "ours" else _stock(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if options.optimizer else None
    before = _resident_gib()

    def step(batch: "Batch") -> None:
        loss(batch).backward()
        if optimizer:
            optimizer.step()
        model.zero_grad()

    input_ids_BT, target_mask_BT = batches[0]
    step((input_ids_BT[:1], target_mask_BT[:1]))
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        step(batch)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    peak_gib = peak_memory_gib() - before
    return {"seconds": seconds / len(batches), "cpu_s": cpu_s / len(batches), "peak_gib": peak_gib}


def check(options: argparse.Namespace) -> dict[str, float]:
    """Largest difference of our gradient of a parameter from the plain one, as norms, over the same batches.

    Raises:
        UserError: it is above 1e-5.
    """
    model, ids, batches = _build(options)

    def gradients(loss: "Loss") -> "dict[str, Tensor]":
        for batch in batches:
            loss(batch).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return found

    plain, ours = gradients(_plain(model, ids=ids)), gradients(_ours(model, ids=ids, options=options))
    errors = {name: float((ours[name] - gradient).norm() / gradient.norm()) for name, gradient in plain.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= GRADIENT_GOAL:
        raise UserError(f"the gradient of {worst} is {errors[worst]:.1e} off that of the plain split loss")
    return {"error": errors[worst]}


def _build(options: argparse.Namespace) -> "tuple[nn.Module, UnifiedVocabulary, list[Batch]]":
    """The model, its ids, and one batch of image rows or four of the mix; the same in every process."""
    model, ids = made_model(options, positions=options.seq_len)
    return model.train(), ids, _batches(options, ids=ids)


def _batches(options: argparse.Namespace, *, ids: "UnifiedVocabulary") -> "list[Batch]":
    """Random rows of the kind asked for."""
    import torch

    from data_mix.batches.schedule import TASKS, MixConfig, Schedule
    from um3.model.sequences import Row, image_to_text_row, text_row, text_to_image_row

    def text(num_tokens: int) -> "Tensor":
        return torch.randint(ids.end_of_image_id + 1, ids.text_vocab_size, (num_tokens,))

    def row(task: str) -> Row:
        if task == "text":
            return text_row(text(options.seq_len - 2), ids=ids)
        caption = text(options.seq_len - ids.image_tokens - ROW_MARKS)
        visual = ids.codes_to_ids(torch.randint(1 << ids.num_bits, (ids.num_patches,)))
        if task == "i2t":
            return image_to_text_row(visual, caption, ids=ids)
        return text_to_image_row(caption, visual, ids=ids)

    mix = MixConfig(calm_down_steps=0) if options.kinds == ["mix"] else MixConfig(end=[0, 0, 1], calm_down_steps=0)
    schedule = Schedule(mix)
    batches = []
    for step in range(MIX_BATCHES if options.kinds == ["mix"] else 1):
        counts = schedule.counts(step, batch_size=options.batch)
        rows = [row(task) for task in TASKS for _ in range(counts[task])]
        batches.append((torch.stack([row.input_ids for row in rows]), torch.stack([row.targets for row in rows])))
    return batches


def _ours(model: Any, *, ids: "UnifiedVocabulary", options: argparse.Namespace) -> "Loss":
    from train.config import UM3LossConfig
    from train.recipes.um3 import UM3Objective

    config = UM3LossConfig(**{"chunk_tokens": options.chunk_tokens} if options.chunk_tokens else {})
    objective = UM3Objective(model, ids=ids, loss=config)

    def loss(batch: "Batch") -> "Tensor":
        found = objective(*batch)
        return found.text_sum / found.text_count.clamp(min=1) + found.visual_sum / found.visual_count.clamp(min=1)

    return loss


def _stock(model: Any) -> "Loss":
    def loss(batch: "Batch") -> "Tensor":
        input_ids_BT, target_mask_BT = batch
        labels_BT = input_ids_BT.masked_fill(~target_mask_BT, -100)
        found: Tensor = model(input_ids=input_ids_BT, labels=labels_BT, use_cache=False).loss
        return found

    return loss


def _plain(model: Any, *, ids: "UnifiedVocabulary") -> "Loss":
    """The split loss over the full logits, cut in two: the mean over each half's targets, as `_ours`."""
    import torch
    import torch.nn.functional as F

    def loss(batch: "Batch") -> "Tensor":
        input_ids_BT, target_mask_BT = batch
        logits_TV = model(input_ids=input_ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets_T, supervised_T = input_ids_BT[:, 1:].flatten(), target_mask_BT[:, 1:].flatten()
        is_text_T = targets_T < ids.text_vocab_size
        total = torch.zeros(())
        for is_half_T, start, end in ((is_text_T, 0, ids.text_vocab_size), (~is_text_T, ids.text_vocab_size, None)):
            labels_T = (targets_T - start).masked_fill(~(is_half_T & supervised_T), -100)
            if (labels_T >= 0).any():
                total = total + F.cross_entropy(logits_TV[:, start:end], labels_T)
        return total

    return loss


def _resident_gib() -> float:
    """What this process holds now; where that is not told, the most it has held."""
    from um3.core.progress import peak_memory_gib

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_gib()
    return pages * resource.getpagesize() / 2**30
