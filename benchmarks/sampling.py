"""`python -m benchmarks sampling`: images drawn by `um3.inference.generate` against transformers' own `generate()`.

The same weights, prompts, grammar (`um3.inference.grammar`), guidance and greedy choice, in one process, one after the other in
every repeat; the fastest run of each counts. "stock" is `generate(guidance_scale=...)`, which runs the unconditional
rows as a batch of their own. "batched" is `generate()` with both halves in one batch, which transformers does not
offer by itself: a logits processor of ours joins them. All must draw the same ids.

Beside the ratio: time per id early and late in the image, and the time the memory needs at least: the weights that a
step reads (layers and one subtoken of the head) and its keys and values, at the speed at which this machine reads a large
tensor.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.model import made_model
from benchmarks.runs import check_positive
from um3.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from um3.model.vocabulary import UnifiedVocabulary

GOAL, FLATNESS_GOAL = 3.0, 0.2
SIDES = ("ours", "stock", "batched")


class Setting(NamedTuple):
    """What is drawn: the model, its ids, prompts of unequal length, the guidance scale."""

    model: "PreTrainedModel"
    ids: "UnifiedVocabulary"
    prompts: "list[Tensor]"
    bare: "Tensor"
    scale: float


class Moment(NamedTuple):
    """The clock and the CPU time of all threads, in seconds: the latter tells more where others use the machine."""

    clock: float
    cpu: float


class Run(NamedTuple):
    """One run: the ids (B, P), its seconds, and when each position was done."""

    visual_ids: "Tensor"
    took: Moment
    moments: list[Moment]


def main(arguments: Sequence[str]) -> None:
    """Measure, print the comparison and then the numbers as JSON.

    Raises:
        UserError: bad options, or sides that draw different ids in float32 on a CPU.
    """
    options = _options(arguments)
    setting = _build(options)
    draw = {"ours": _ours, "stock": _stock, "batched": _batched}
    runs: dict[str, list[Run]] = {side: [] for side in options.sides}
    for repeat in range(options.repeats):
        for side, found in runs.items():
            print(f"run {repeat + 1} of {options.repeats}, {side}", flush=True)
            found.append(_timed(draw[side], setting))
    best = {side: min(found, key=lambda run: run.took) for side, found in runs.items()}
    bound_ms = _bound_ms(setting)
    for side, run in best.items():
        print(_line(side, run, options=options))
    for side in options.sides[1:]:
        ratio, cpu = (theirs / ours for theirs, ours in zip(best[side].took, best["ours"].took, strict=True))
        same = (best[side].visual_ids == best["ours"].visual_ids).all(dim=1).sum()
        print(
            f"ours against {side}: {ratio:.1f}x by the clock, {cpu:.1f}x in CPU time (goal {GOAL}x); "
            f"{same} of {options.batch} images equal to the id"
        )
    early, late = _early_and_late(best["ours"])
    print(
        f"memory bound {bound_ms:.2f} ms an id, ours {(early.clock + late.clock) / 2:.2f}; late in the image "
        f"{late.clock / early.clock - 1:+.0%} of early by the clock, {late.cpu / early.cpu - 1:+.0%} in CPU time "
        f"(goal {FLATNESS_GOAL:.0%})"
    )
    print(json.dumps(_numbers(options, runs=runs, bound_ms=bound_ms)))
    # In bf16, or by a GPU's kernels, rounding decides between ids that are nearly as likely.
    exact = options.device == "cpu" and options.dtype == "float32"
    for side in options.sides[1:] if exact else []:
        if not (best[side].visual_ids == best["ours"].visual_ids).all():
            raise UserError(f"ours and {side} drew different ids")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sampling", description=__doc__)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ours first (default all)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--patches", type=int, default=256, help="of an image, two ids each (default 256)")
    parser.add_argument("--width", type=int, default=512, help="of the model (default 512)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default 8)")
    parser.add_argument("--text-vocab-size", type=int, default=128_258, help="of the vocabulary (default 128258)")
    parser.add_argument("--bits-per-subtoken", type=int, default=14, help="of a code; two subtokens (default 14)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is off (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    options = parser.parse_args(arguments)
    check_positive(options, "batch", "patches", "width", "layers", "text_vocab_size", "bits_per_subtoken")
    check_positive(options, "repeats", "threads")
    if options.bits_per_subtoken > 20:
        raise UserError(f"--bits-per-subtoken is {options.bits_per_subtoken}; at most 20")
    if options.text_vocab_size < 8:
        raise UserError(f"--text-vocab-size is {options.text_vocab_size}; at least 8, five of them are marks")
    if options.sides[0] != "ours":
        raise UserError(f"--sides begins with {options.sides[0]}; it must begin with ours")
    return options


def _build(options: argparse.Namespace) -> Setting:
    import torch

    from um3.model import sequences as rows

    made, ids = made_model(options, positions=2 * options.patches + 64)
    model = made.eval().to(options.device, getattr(torch, options.dtype))
    captions = [torch.randint(5, options.text_vocab_size, (12 + 3 * (row % 4),)) for row in range(options.batch)]
    return Setting(
        model=model,
        ids=ids,
        prompts=[rows.image_prompt(caption, ids=ids) for caption in captions],
        bare=rows.image_prompt([], ids=ids),
        scale=options.guidance_scale,
    )


def _timed(draw: "Callable[[Setting, list[Moment]], Tensor]", setting: Setting) -> Run:
    moments: list[Moment] = []
    start = _now()
    visual_ids = draw(setting, moments).cpu()  # waits for a GPU
    end = _now()
    return Run(visual_ids, Moment(end.clock - start.clock, end.cpu - start.cpu), moments)


def _now() -> Moment:
    import torch

    if torch.cuda.is_initialized():  # its work is behind
        torch.cuda.synchronize()
    return Moment(time.perf_counter(), time.process_time())


def _ours(setting: Setting, moments: list[Moment]) -> "Tensor":
    import torch

    from um3.inference.generate import draw_images
    from um3.inference.sampling_params import Sampling

    return draw_images(
        setting.model,
        prompts=setting.prompts,
        unconditional_prompt=setting.bare,
        ids=setting.ids,
        sampling=Sampling(temperature=0, guidance_scale=setting.scale),
        uniforms_BP=torch.zeros(len(setting.prompts), setting.ids.image_tokens),
        watch=lambda _: moments.append(_now()),
    ).visual_ids


def _stock(setting: Setting, moments: list[Moment]) -> "Tensor":
    bare = setting.bare.repeat(len(setting.prompts), 1).to(setting.model.device)
    negative = {"negative_prompt_ids": bare, "guidance_scale": setting.scale} if setting.scale != 1 else {}
    return _generate(setting, setting.prompts, moments, [], **negative)


def _batched(setting: Setting, moments: list[Moment]) -> "Tensor":
    from transformers import LogitsProcessor

    class Guidance(LogitsProcessor):
        """Both halves get the guided logits, so both draw the same."""

        def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
            own, free = scores.chunk(2)
            guided = free + setting.scale * (own - free)
            return guided.repeat(2, 1)

    if setting.scale == 1:
        return _stock(setting, moments)
    prompts = [*setting.prompts, *[setting.bare] * len(setting.prompts)]
    return _generate(setting, prompts, moments, [Guidance()])[: len(setting.prompts)]


def _generate(
    setting: Setting, prompts: "list[Tensor]", moments: list[Moment], first: list[Any], **options: Any
) -> "Tensor":
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from um3.inference.grammar import GrammarProcessor

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
            moments.append(_now())
            return scores

    longest, device = max(map(len, prompts)), setting.model.device
    input_ids = torch.full((len(prompts), longest), setting.ids.pad_id)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    positions_T = torch.arange(longest)
    seen = positions_T >= longest - torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    output = setting.model.generate(  # type: ignore[operator]
        input_ids.to(device),
        attention_mask=seen.long().to(device),
        do_sample=False,
        max_new_tokens=setting.ids.image_tokens,
        pad_token_id=setting.ids.pad_id,
        logits_processor=LogitsProcessorList([*first, GrammarProcessor(setting.ids), Clock()]),
        **options,
    )
    found: Tensor = output[:, longest:]
    return found


def _early_and_late(run: Run) -> tuple[Moment, Moment]:
    """Milliseconds an id in the first and in the last quarter of the image, medians."""
    steps = [
        Moment(1000 * (after.clock - before.clock), 1000 * (after.cpu - before.cpu))
        for before, after in itertools.pairwise(run.moments)
    ]
    quarter = max(1, len(steps) // 4)

    def middle(part: list[Moment]) -> Moment:
        return Moment(statistics.median(each.clock for each in part), statistics.median(each.cpu for each in part))

    return middle(steps[:quarter]), middle(steps[-quarter:])


def _bound_ms(setting: Setting) -> float:
    """The least time of a step: what it reads, keys and values of half the image among it, at the memory's speed."""

    from um3.inference.sampling_params import Sampling

    model, ids = setting.model, setting.ids
    layers = sum(each.numel() for each in model.model.layers.parameters())
    rows = len(setting.prompts) * (2 if Sampling(guidance_scale=setting.scale).guided else 1)
    config = model.config
    places = ids.image_tokens // 2 + max(map(len, setting.prompts))
    cache = 2 * config.num_hidden_layers * rows * places * config.num_key_value_heads * config.head_dim
    head = (1 << ids.bits_per_subtoken) * config.hidden_size
    read = (layers + head + cache) * model.dtype.itemsize
    return 1000 * read / _bytes_per_second(model.device)


def _bytes_per_second(device: "torch.device") -> float:
    import torch

    large = torch.ones(2**26, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        float(large.sum())
        best = min(best, time.perf_counter() - start)
    return 4 * len(large) / best


def _line(side: str, run: Run, *, options: argparse.Namespace) -> str:
    early, late = _early_and_late(run)
    return (
        f"{side}: {options.batch / run.took.clock:.3f} images/s, {run.took.clock:.2f} s for {options.batch}, "
        f"{run.took.cpu:.2f} s of CPU time; {early.clock:.2f} ms an id early, {late.clock:.2f} late "
        f"({early.cpu:.2f} and {late.cpu:.2f} of CPU time)"
    )


def _numbers(options: argparse.Namespace, *, runs: dict[str, list[Run]], bound_ms: float) -> dict[str, Any]:
    """Options and every run; each time is a pair, by the clock and in CPU time."""

    def row(run: Run) -> dict[str, Any]:
        early, late = _early_and_late(run)
        return {"seconds": run.took, "early_ms": early, "late_ms": late}

    rows = {side: [row(run) for run in found] for side, found in runs.items()}
    return {**vars(options), "bound_ms": bound_ms, **rows}
