"""`python -m benchmarks tokenizer`: QLIP's encode and decode against a plain transcription of the released code.

The plain side writes out every attention matrix, uses torch's linear layers and computes the quantizer's entropy at
each encode, as the released inference code does, in float32. Both sides have the same weights and images.
`--precision` and `--compile` change our side only. Large matrix products in our process show what share of the
machine's FLOP/s our encode reaches.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.harness import benchmark_parser, fastest, fastest_product, now, run_sides
from um3.core.commands import positive
from um3.core.errors import UserError

if TYPE_CHECKING:
    from tokenizer.configuration import QLIPConfig

BASE = dict(image_size=256, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048)
LARGE = dict(image_size=392, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=2730)
VARIANTS = {"B-16": BASE | {"patch_size": 16}, "B-8": BASE | {"patch_size": 8}, "L-14": LARGE | {"patch_size": 14}}
SIDES = ("ours", "plain")
CPU_GOALS = {"B-16": " (goal 1.15x)", "B-8": " (goal 1.3x and 0.6x the memory)"}
ITERATIONS = {"cpu": 1, "cuda": 20}
"""Calls that are timed and averaged after the warm-up."""
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def main(arguments: Sequence[str]) -> None:
    """Measure and print one line per variant, then the numbers as JSON."""
    options = parse(arguments)
    if options.side:
        print(json.dumps(measure(options)))
        return
    for variant in options.variants:
        command = [*arguments, "--device", options.device, "--variants", variant]
        results = run_sides("tokenizer", command, sides=SIDES, repeats=options.repeats)
        ours, plain = (fastest(results[side]) for side in SIDES)
        speedup = {key: plain[key] / ours[key] for key in ("seconds", "encode", "decode")}
        print(_comparison(variant, ours=ours, plain=plain, speedup=speedup, options=options))
        peak = max(run["peak_flops"] for run in results["ours"])
        reached = ours["encode_flops"] * options.batch / min(run["encode"] for run in results["ours"])
        utilisation = {
            "encode_tflops": reached / 1e12,
            "peak_tflops": peak / 1e12,
            "encode_utilisation": reached / peak,
        }
        print(
            f"{variant}: encode takes {ours['encode_flops'] / 1e9:.4g} GFLOP an image and reaches "
            f"{reached / 1e12:.3g} TFLOP/s, {reached / peak:.0%} of {peak / 1e12:.3g} ({ours['peak_how']})"
        )
        settings = {name: getattr(options, name) for name in ("batch", "device", "precision", "compile")}
        print(json.dumps({"variant": variant, "speedup": speedup, **utilisation, **settings, **results}))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with the device's defaults."""
    parser = benchmark_parser("tokenizer", __doc__, sides=SIDES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default B-16 B-8, on a GPU also L-14")
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (default 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda if there is a GPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our side's weights")
    parser.add_argument(
        "--compile", nargs="?", const="reduce-overhead", choices=COMPILE_MODES, metavar="MODE",
        help="torch.compile our side: default, reduce-overhead (CUDA graphs; without a MODE) or max-autotune",
    )  # fmt: skip
    parser.add_argument("--image-size", type=positive, help="pixels; the variant's own unless given")
    parser.add_argument("--layers", type=positive, help="of encoder and decoder; the variant's own unless given")
    options = parser.parse_args(arguments)
    import torch

    gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if gpu else "cpu")
    if options.device == "cuda" and not gpu:
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if options.compile and options.device == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise UserError("--compile needs a C++ compiler on a CPU; install g++, or remove --compile")
    # L-14 takes minutes a batch on a CPU.
    options.variants = options.variants or (["B-16", "B-8"] if options.device == "cpu" else list(VARIANTS))
    for variant in options.variants:
        size, patch = options.image_size or VARIANTS[variant]["image_size"], VARIANTS[variant]["patch_size"]
        if size % patch:
            raise UserError(f"--image-size is {size}; {variant} needs a multiple of its patch size, {patch}")
    return options


def _comparison(
    variant: str,
    *,
    ours: dict[str, float],
    plain: dict[str, float],
    speedup: dict[str, float],
    options: argparse.Namespace,
) -> str:
    how = f" in {options.precision}" + (f", compiled ({options.compile})" if options.compile else "")
    line = (
        f"{variant}: {options.batch / ours['seconds']:.2f} images/s{how}, "
        f"plain {options.batch / plain['seconds']:.2f} in fp32: {speedup['seconds']:.2f}x; "
        f"encode {speedup['encode']:.2f}x, decode {speedup['decode']:.2f}x"
    )
    if "peak_gib" in ours:
        ratio = ours["peak_gib"] / max(plain["peak_gib"], 1e-6)
        line += f"; memory beside the model {ours['peak_gib']:.2f} GiB, plain {plain['peak_gib']:.2f}: {ratio:.2f}x"
    return line + (CPU_GOALS.get(variant, "") if options.device == "cpu" else "")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to encode and to decode a batch after a warm-up, and the peak memory that this added (GiB).

    One CPU thread is measured in CPU time, which other work on the machine changes little. Memory is torch's on a GPU,
    else resident; a compiled run on a CPU has none, because compiling needs more than running. Our side adds the FLOP
    of encoding an image and the FLOP/s of large matrix products.
    """
    import torch

    from um3.core.progress import peak_memory_gib

    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    compiled = bool(options.compile) and options.side == "ours"
    clock = time.process_time if not gpu and torch.get_num_threads() == 1 else now
    encode, decode, pixels_BCHW = _build(options)

    def peak_gib() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_memory_gib()

    def timed(function: Callable[..., torch.Tensor], inputs: torch.Tensor, *, calls: int) -> tuple[float, torch.Tensor]:
        start = clock()
        for _ in range(calls):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            result = function(inputs)
        return (clock() - start) / calls, result.clone()

    def both(pixels: torch.Tensor, *, calls: int) -> dict[str, float]:
        encode_s, codes_BN = timed(encode, pixels, calls=calls)
        decode_s, _ = timed(decode, codes_BN, calls=calls)
        return {"encode": encode_s, "decode": decode_s, "seconds": encode_s + decode_s}

    with torch.inference_mode():
        # Compiled code is specific to a batch size, and a CUDA graph is recorded in the second call.
        whole_batch = gpu or compiled
        both(pixels_BCHW if whole_batch else pixels_BCHW[:1], calls=1)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        before_gib = peak_gib()
        if whole_batch:
            both(pixels_BCHW, calls=2)
        result: dict[str, Any] = both(pixels_BCHW, calls=ITERATIONS[options.device])
    if gpu or not compiled:
        result["peak_gib"] = peak_gib() - before_gib
    if options.side == "ours":
        from train.plan.image_flops import encode_flops

        result["encode_flops"] = encode_flops(_config(options))
        peak = fastest_product(precision=options.precision, device=pixels_BCHW.device, clock=clock)
        result["peak_flops"], result["peak_how"] = peak
    return result


def _build(options: argparse.Namespace) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """(encode, decode, a batch of pixels) of a side and variant."""
    import torch

    from tokenizer import layers
    from tokenizer.modeling import QLIPModel

    plain = options.side == "plain"
    torch.manual_seed(0)
    config = _config(options)
    size = config.vision_tower.image_size
    dtype = torch.bfloat16 if options.precision == "bf16" and not plain else torch.float32
    # Built in its final precision: a conversion would leave a peak that hides what a batch adds.
    model = QLIPModel._from_config(config, dtype=dtype).eval().to(options.device, dtype)
    pixels_BCHW = torch.randn(options.batch, 3, size, size).to(options.device, dtype)
    if plain:
        layers.F = PlainFunctions(layers.F)  # type: ignore[assignment]
        layers.Linear.forward = torch.nn.Linear.forward  # type: ignore[method-assign,assignment]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.vision_model.quantize(model.vision_model(pixels), entropy=plain).codes_BN

    if options.compile and not plain:
        # Not `decode` itself: its check of the codes would break the graph.
        model.decode_quantized = torch.compile(model.decode_quantized, mode=options.compile)
        return torch.compile(encode, mode=options.compile), model.decode, pixels_BCHW
    return encode, model.decode, pixels_BCHW


def _config(options: argparse.Namespace) -> "QLIPConfig":
    from tokenizer.configuration import QLIPConfig

    changes = {"image_size": options.image_size, "num_hidden_layers": options.layers}
    tower = VARIANTS[options.variants[0]] | {key: value for key, value in changes.items() if value}
    vision = tower | {"quantizer_cfg": {"embed_dim": 28}}
    return QLIPConfig(text_config={"num_hidden_layers": 1}, vision_config=vision, decoder_config=tower)


class PlainFunctions:
    """torch.nn.functional with attention written out."""

    def __init__(self, functions: Any):
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def scaled_dot_product_attention(self, q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
        """softmax(Q K^T / sqrt(H)) V with the whole matrix in memory."""
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if is_causal:
            scores = scores + scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
        return scores.softmax(-1) @ v
