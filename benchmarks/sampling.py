"""`python -m benchmarks sampling`: image generation by `um3.inference.generate` against transformers' `generate()`.

All sides have the same weights, prompts, grammar, guidance and greedy choice, and must generate the same ids. "stock"
is `generate(guidance_scale=...)`, which runs the unconditional sequences as a batch of their own. "batched" runs both
halves in one batch, which transformers does not offer: a logits processor of ours joins them.

Printed beside the ratio: time per id early and late in the image, and the lower bound that memory sets: reading the
weights of a step (layers, one sub-token's range of the head) and its keys and values at this machine's read speed.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness import Results, benchmark_parser, fastest, now, run_sides
from benchmarks.synthetic import SPECIAL_IDS, SUBTOKENS, add_model_options, synthetic_model
from um3.core.errors import UserError
from um3.core.files import short_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from um3.model.vocabulary import UnifiedVocabulary

GOAL, FLATNESS_GOAL = 3.0, 0.2
SIDES = ("ours", "stock", "batched")


class Setting(NamedTuple):
    """What is generated: the model, its vocabulary, prompts of unequal length, the guidance scale."""

    model: "PreTrainedModel"
    ids: "UnifiedVocabulary"
    prompts: "list[Tensor]"
    unconditional: "Tensor"
    scale: float


def main(arguments: Sequence[str]) -> None:
    """Measure, print the comparison, then the numbers as JSON."""
    parser = benchmark_parser("sampling", __doc__, sides=SIDES)
    add_model_options(parser, layers=8)
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], default=list(SIDES[1:]), help="compared with ours")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is off (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(options)))
        return
    results = run_sides("sampling", arguments, sides=("ours", *options.sides), repeats=options.repeats)
    best = {side: fastest(side_results) for side, side_results in results.items()}
    for side, run in best.items():
        print(
            f"{side}: {options.batch / run['seconds']:.3f} images/s, {run['cpu_s']:.2f} s of CPU time for "
            f"{options.batch}; {run['early_ms']:.2f} ms an id early, {run['late_ms']:.2f} late"
        )
    ours = best["ours"]
    for side in options.sides:
        same = sum(a == b for a, b in zip(best[side]["images"], ours["images"], strict=True))
        print(
            f"ours against {side}: {best[side]['seconds'] / ours['seconds']:.1f}x by the clock, "
            f"{best[side]['cpu_s'] / ours['cpu_s']:.1f}x in CPU time (goal {GOAL}x); "
            f"{same} of {options.batch} images have equal ids"
        )
    ours_ms = (ours["early_ms"] + ours["late_ms"]) / 2
    print(
        f"memory bound {ours['bound_ms']:.2f} ms an id, ours {ours_ms:.2f}; "
        f"late in the image {ours['late_ms'] / ours['early_ms'] - 1:+.0%} of early (goal {FLATNESS_GOAL:.0%})"
    )
    print(json.dumps(vars(options) | results | {"share_of_memory_bound": ours["bound_ms"] / ours_ms}))
    # In bf16, or on a GPU, rounding decides between ids that are almost equally likely.
    if options.device == "cpu" and options.dtype == "float32":
        check_same_images(results)


def check_same_images(results: Results) -> None:
    """Compare the ids of every image over all sides and repeats; UserError if they differ."""
    images = {tuple(result["images"]) for side_results in results.values() for result in side_results}
    if len(images) > 1:
        raise UserError(f"{', '.join(results)} generated different ids")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generate once: seconds, CPU seconds, milliseconds an id, and a hash of every image's ids."""
    import torch

    setting = build(options)
    times: list[float] = []
    generate = ours if options.side == "ours" else functools.partial(stock, batched=options.side == "batched")
    if torch.cuda.is_initialized():
        generate(setting, lambda: None)  # the first kernels of a process start slowly
    start, start_cpu = now(), time.process_time()
    visual_ids_BP = generate(setting, lambda: times.append(now())).cpu()
    seconds, cpu_s = now() - start, time.process_time() - start_cpu
    steps_ms = [1000 * (later - earlier) for earlier, later in itertools.pairwise(times)]
    quarter = max(1, len(steps_ms) // 4)
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "early_ms": statistics.median(steps_ms[:quarter]),
        "late_ms": statistics.median(steps_ms[-quarter:]),
        "images": [short_hash(row) for row in visual_ids_BP.tolist()],
        "bound_ms": _bound_ms(setting) if options.side == "ours" else None,
    }


def build(options: argparse.Namespace) -> Setting:
    """The model and prompts; the same in every process."""
    import torch

    from um3.model import sequences

    model, ids = synthetic_model(options, max_positions=SUBTOKENS * options.patches + 64)
    model = model.eval().to(options.device, getattr(torch, options.dtype))
    lengths = [12 + 3 * (number % 4) for number in range(options.batch)]
    captions = [torch.randint(len(SPECIAL_IDS), options.text_vocab_size, (length,)) for length in lengths]
    prompts = [sequences.image_prompt(caption, ids=ids) for caption in captions]
    return Setting(model, ids, prompts, sequences.image_prompt([], ids=ids), options.guidance_scale)


def ours(setting: Setting, tick: Callable[[], None]) -> "Tensor":
    """Visual ids (B, P) by `um3.inference.generate`; `tick` is called after every position."""
    import torch

    from um3.inference.generate import Sampler
    from um3.inference.sampling_params import Sampling

    generated = Sampler(setting.model, ids=setting.ids).images(
        prompts=setting.prompts,
        unconditional_prompt=setting.unconditional,
        sampling=Sampling(temperature=0, guidance_scale=setting.scale),
        uniforms_BP=torch.zeros(len(setting.prompts), setting.ids.image_tokens),
        watch=lambda _: tick(),
    )
    return generated.visual_ids


def stock(setting: Setting, tick: Callable[[], None], *, batched: bool) -> "Tensor":
    """The same by `generate()`: with its own guidance, or with both halves of the guidance in one batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LogitsProcessor, LogitsProcessorList

    from um3.inference.grammar import GrammarProcessor

    class Guidance(LogitsProcessor):
        """Gives both halves the guided logits, so that both choose the same id."""

        def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
            conditional, unconditional = scores.chunk(2)
            return (unconditional + setting.scale * (conditional - unconditional)).repeat(2, 1)

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
            tick()
            return scores

    prompts, count, device = setting.prompts, len(setting.prompts), setting.model.device
    processors: list[LogitsProcessor] = [GrammarProcessor(setting.ids), Clock()]
    guidance: dict[str, Any] = {}
    if setting.scale != 1 and batched:
        prompts, processors = [*prompts, *[setting.unconditional] * count], [Guidance(), *processors]
    elif setting.scale != 1:
        negative = setting.unconditional.repeat(count, 1).to(device)
        guidance = {"negative_prompt_ids": negative, "guidance_scale": setting.scale}
    input_ids = pad_sequence(prompts, batch_first=True, padding_value=setting.ids.pad_id, padding_side="left")
    attended = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    output: Tensor = setting.model.generate(  # type: ignore[operator]
        input_ids.to(device),
        attention_mask=attended.to(device),
        do_sample=False,
        max_new_tokens=setting.ids.image_tokens,
        pad_token_id=setting.ids.pad_id,
        logits_processor=LogitsProcessorList(processors),
        **guidance,
    )
    return output[:count, input_ids.shape[1] :]


def _bound_ms(setting: Setting) -> float:
    """The least time of a step: the bytes it reads, with keys and values of half the image, at the read speed."""
    model, ids, config = setting.model, setting.ids, setting.model.config
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    sequences = len(setting.prompts) * (1 if setting.scale == 1 else 2)
    positions = ids.image_tokens // 2 + max(map(len, setting.prompts))
    cache = 2 * config.num_hidden_layers * sequences * positions * config.num_key_value_heads * config.head_dim
    head = (1 << ids.bits_per_subtoken) * config.hidden_size
    return 1000 * (layers + head + cache) * model.dtype.itemsize / _bytes_per_second(model.device)


def _bytes_per_second(device: "torch.device") -> float:
    import torch

    large = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)  # 4 GiB take a GPU a millisecond
    best_s = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        float(large.sum())
        best_s = min(best_s, time.perf_counter() - start)
    return 4 * len(large) / best_s
