"""`python -m benchmarks um3-loss`: a training step of UM3 with the split loss against transformers' own loss.

Stock is `model(input_ids, labels)`: logits of every position over the whole vocabulary, and their cross entropy. Ours
is the objective of `python -m train um3`. Both have the same Qwen3, weights and sequences, in float32. A step is
forward and backward, with --optimizer also AdamW's step. A further process compares our gradients with those of the
split loss over full logits.

Sequences are full (no padding) and supervised as in training. "image" is text-to-image. "mix" is text, image-to-text
and text-to-image at the paper's 12:1:3 over four batches; a step's time is their mean.
"""

import argparse
import functools
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Results, benchmark_parser, fastest, run_side, run_sides
from benchmarks.synthetic import SPECIAL_IDS, SUBTOKENS, add_model_options, synthetic_model
from um3.core.commands import positive
from um3.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from um3.model.vocabulary import UnifiedVocabulary

    Batch = tuple[Tensor, Tensor]  # input_ids_BT, target_mask_BT
    Loss = Callable[[Batch], Tensor]

GOALS = {"image": 3.0, "mix": 1.2}
"""Speed-up over stock."""
MEMORY_GOAL, GRADIENT_GOAL = 0.25, 1e-5
MIX_BATCHES = 4
SIDES = ("ours", "stock")
MARKS = 4  # bos, begin of image, end of image, eos


def main(arguments: Sequence[str]) -> None:
    """Measure and print one line per kind of sequences, then the numbers as JSON."""
    options = parse(arguments)
    if options.side:
        print(json.dumps(check(options) if options.side == "check" else measure(options)))
        return
    for kind in options.kinds:
        command = [*arguments, "--kinds", kind]
        label = f"{kind}, gradients against the plain split loss"
        checked = run_side("um3-loss", command, side="check", label=label)
        results = run_sides("um3-loss", command, sides=SIDES, repeats=options.repeats)
        print(_comparison(kind, results, error=checked["error"]))
        settings = {name: value for name, value in vars(options).items() if name not in ("kinds", "side")}
        print(json.dumps({"kind": kind, **settings, **checked, **results}))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; UserError if sequences are too short for an image."""
    parser = benchmark_parser("um3-loss", __doc__, sides=(*SIDES, "check"))
    add_model_options(parser, layers=4)
    parser.add_argument("--kinds", nargs="+", choices=GOALS, default=list(GOALS), help="default image mix")
    parser.add_argument("--seq-len", type=positive, default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--chunk-tokens", type=positive, help="positions with logits at a time (default: training's)")
    parser.add_argument("--optimizer", action="store_true", help="include AdamW's step and state")
    options = parser.parse_args(arguments)
    shortest = SUBTOKENS * options.patches + MARKS + 1
    if options.seq_len < shortest:
        raise UserError(
            f"--seq-len is {options.seq_len}; an image of {options.patches} patches and a caption need {shortest}"
        )
    return options


def _comparison(kind: str, results: Results, *, error: float) -> str:
    ours, stock = (fastest(results[side]) for side in SIDES)
    memory = ours["peak_gib"] / max(stock["peak_gib"], 1e-6)
    return (
        f"{kind}: {ours['seconds']:.2f} s a step, stock {stock['seconds']:.2f}: "
        f"{stock['seconds'] / ours['seconds']:.2f}x (goal {GOALS[kind]}x); memory beside the model "
        f"{ours['peak_gib']:.2f} GiB, stock {stock['peak_gib']:.2f}: {memory:.2f}x (goal {MEMORY_GOAL}x); "
        f"gradients within {error:.0e} of the plain split loss (goal {GRADIENT_GOAL:.0e})"
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step after a warm-up, CPU seconds of all threads, and peak memory beside the model (GiB)."""
    import torch

    from um3.core.progress import peak_memory_gib

    model, ids, batches = build(options)
    stock = functools.partial(stock_loss, model)
    loss = our_loss(model, ids=ids, options=options) if options.side == "ours" else stock
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if options.optimizer else None
    before_gib = _resident_gib()

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
    peak_gib = peak_memory_gib() - before_gib
    return {"seconds": seconds / len(batches), "cpu_s": cpu_s / len(batches), "peak_gib": peak_gib}


def check(options: argparse.Namespace) -> dict[str, float]:
    """The largest relative difference (of norms) between our gradient of a parameter and the plain loss's.

    UserError if it is above 1e-5.
    """
    model, ids, batches = build(options)

    def gradients(loss: "Loss") -> "dict[str, Tensor]":
        for batch in batches:
            loss(batch).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return grads

    plain = gradients(functools.partial(plain_loss, model, ids.text_vocab_size))
    ours = gradients(our_loss(model, ids=ids, options=options))
    errors = {name: float((ours[name] - gradient).norm() / gradient.norm()) for name, gradient in plain.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= GRADIENT_GOAL:
        raise UserError(f"the gradient of {worst} differs by {errors[worst]:.1e} from that of the plain split loss")
    return {"error": errors[worst]}


def build(options: argparse.Namespace) -> "tuple[nn.Module, UnifiedVocabulary, list[Batch]]":
    """The model, its vocabulary, and one batch of images or four of the mix; the same in every process."""
    import torch

    from data_mix.batches.schedule import TASKS, MixConfig, Schedule
    from um3.model import sequences

    model, ids = synthetic_model(options, max_positions=options.seq_len)

    def text(num_tokens: int) -> "Tensor":
        return torch.randint(len(SPECIAL_IDS), ids.text_vocab_size, (num_tokens,))

    def sequence(task: str) -> Any:
        if task == "text":
            return sequences.text_sequence(text(options.seq_len - 2), ids=ids)
        caption = text(options.seq_len - ids.image_tokens - MARKS)
        visual = ids.codes_to_ids(torch.randint(1 << ids.num_bits, (ids.num_patches,)))
        if task == "i2t":
            return sequences.image_to_text_sequence(visual, caption, ids=ids)
        return sequences.text_to_image_sequence(caption, visual, ids=ids)

    is_mix = options.kinds == ["mix"]
    schedule = Schedule(MixConfig(calm_down_steps=0) if is_mix else MixConfig(end=[0, 0, 1], calm_down_steps=0))
    batches = []
    for step in range(MIX_BATCHES if is_mix else 1):
        counts = schedule.counts(step, batch_size=options.batch)
        rows = [sequence(task) for task in TASKS for _ in range(counts[task])]
        batches.append((torch.stack([row.input_ids for row in rows]), torch.stack([row.targets for row in rows])))
    return model.train(), ids, batches


def our_loss(model: Any, *, ids: "UnifiedVocabulary", options: argparse.Namespace) -> "Loss":
    """The objective of `python -m train um3`."""
    from train.recipes.um3 import UM3Objective
    from train.settings.um3 import UM3LossConfig

    config = UM3LossConfig(**{"chunk_tokens": options.chunk_tokens} if options.chunk_tokens else {})
    objective = UM3Objective(model, ids=ids, loss=config)

    def loss(batch: "Batch") -> "Tensor":
        sums = objective(*batch)
        return sums.text_sum / sums.text_count.clamp(min=1) + sums.visual_sum / sums.visual_count.clamp(min=1)

    return loss


def stock_loss(model: Any, batch: "Batch") -> "Tensor":
    """transformers' cross entropy over the whole vocabulary."""
    input_ids_BT, target_mask_BT = batch
    labels_BT = input_ids_BT.masked_fill(~target_mask_BT, -100)
    loss: Tensor = model(input_ids=input_ids_BT, labels=labels_BT, use_cache=False).loss
    return loss


def plain_loss(model: Any, text_vocab_size: int, batch: "Batch") -> "Tensor":
    """The split loss over the full logits: the sum of the means over each half's targets."""
    import torch
    import torch.nn.functional as F

    input_ids_BT, target_mask_BT = batch
    logits_TV = model(input_ids=input_ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets_T, supervised_T = input_ids_BT[:, 1:].flatten(), target_mask_BT[:, 1:].flatten()
    is_text_T, loss = targets_T < text_vocab_size, torch.zeros(())
    for is_half_T, start, end in ((is_text_T, 0, text_vocab_size), (~is_text_T, text_vocab_size, None)):
        labels_T = (targets_T - start).masked_fill(~(is_half_T & supervised_T), -100)
        if (labels_T >= 0).any():
            loss = loss + F.cross_entropy(logits_TV[:, start:end], labels_T)
    return loss


def _resident_gib() -> float:
    """Resident memory of this process; its peak where the system does not report it."""
    from um3.core.progress import peak_memory_gib

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_gib()
    return pages * resource.getpagesize() / 2**30
