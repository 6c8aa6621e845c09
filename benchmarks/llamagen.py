"""`python -m benchmarks llamagen`: LlamaGen with one position a patch (depth) against one an id (flat).

Both have the same sizes, captions and codes; depth has the layers of its head on top. A step is forward and backward
with the loss of `make llamagen`, without the optimizer, whose time does not depend on the positions. A drawing is one
guided image a caption by the cached decoder.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import benchmark_parser, now, run_sides
from um3.core.commands import positive

SIDES = ("depth", "flat")
GOALS = {"step": 0.65, "draw": 0.55}
"""Time of depth, as a share of flat's, for 2 x 14 bits at 256 patches."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print a line per comparison, then the numbers as JSON."""
    parser = benchmark_parser("llamagen", __doc__, sides=SIDES)
    for name, default, about in (
        ("hidden-size", 1280, "of the model"),
        ("layers", 36, "of the model"),
        ("depth-layers", 1, "of the depth head"),
        ("patches", 256, "of an image"),
        ("subtokens", 2, "of a code"),
        ("bits-per-subtoken", 14, "of a code"),
        ("caption-tokens", 120, "of every caption"),
        ("batch", 1, "images of a step, and of a drawing"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{about} (default {default})")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is off (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(options)))
        return
    results = run_sides("llamagen", arguments, sides=SIDES, repeats=options.repeats)
    for what, goal in GOALS.items():
        (depth_s, depth_cpu_s), (flat_s, flat_cpu_s) = (_fastest(results[side], what) for side in SIDES)
        print(
            f"{what}: {depth_s:.2f} s, flat {flat_s:.2f}: {depth_s / flat_s:.2f}x by the clock, "
            f"{depth_cpu_s / flat_cpu_s:.2f}x in CPU time (goal {goal}x)"
        )
    print(json.dumps(vars(options) | results))


def _fastest(runs: Sequence[dict[str, Any]], what: str) -> list[float]:
    return [min(times) for times in zip(*(run[what] for run in runs), strict=True)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and CPU seconds of a training step after a warm-up and of a drawing; the number of parameters."""
    import torch

    from downstream.llamagen.configuration import LlamaGenConfig
    from downstream.llamagen.decoding import Decoder
    from downstream.llamagen.modeling import LlamaGen
    from train.recipes.llamagen import LlamaGenObjective
    from um3.inference.sampling_params import Sampling

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaGenConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 64),
        max_caption_tokens=options.caption_tokens,
        num_patches=options.patches,
        subtokens=options.subtokens,
        bits_per_subtoken=options.bits_per_subtoken,
        prediction=options.side,
        depth_layers=options.depth_layers,
        dropout=0.0,
    )
    model = LlamaGen(config).to(options.device, getattr(torch, options.dtype))
    objective = LlamaGenObjective(model, chunk_tokens=2048)
    features_BTC = torch.randn(options.batch, options.caption_tokens, config.caption_width)
    features_BTC = features_BTC.to(options.device, getattr(torch, options.dtype))
    mask_BT = torch.ones(features_BTC.shape[:2], dtype=torch.bool, device=options.device)
    ids_BP = torch.randint(config.slot_size, (options.batch, config.image_tokens), device=options.device)
    dropped_B = mask_BT.new_zeros(options.batch)

    def step() -> None:
        objective(features_BTC, mask_BT, ids_BP, dropped_B).sum().backward()
        model.zero_grad()

    def draw() -> None:
        Decoder(model.eval()).images(
            features_BTC=features_BTC,
            caption_mask_BT=mask_BT,
            sampling=Sampling(guidance_scale=options.guidance_scale),
            uniforms_BP=torch.rand(ids_BP.shape, dtype=torch.float64),
        )

    step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if torch.cuda.is_initialized():
        draw()
    return {"step": _timed(step), "draw": _timed(draw), "parameters": parameters}


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and CPU seconds of all threads."""
    start, start_cpu = now(), time.process_time()
    work()
    return now() - start, time.process_time() - start_cpu
