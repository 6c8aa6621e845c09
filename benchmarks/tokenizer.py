"""`python -m benchmarks tokenizer`: QLIP's encode and decode against a plain transcription of the released code.

The plain one writes every attention matrix out (softmax of Q K^T, then times V), has torch's own linear layers and
computes the quantizer's entropy terms at each encode, as the released inference code does, in float32. Same weights,
same images, every run in a process of its own so that its peak memory is its own; runs alternate, and the fastest of
each is compared.
`--precision` and `--compile` change our side only.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.runs import check_positive, run_apart
from um3.core.errors import UserError

BASE = dict(image_size=256, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048)
LARGE = dict(image_size=392, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=2730)
VARIANTS = {"B-16": BASE | {"patch_size": 16}, "B-8": BASE | {"patch_size": 8}, "L-14": LARGE | {"patch_size": 14}}
CPU_VARIANTS = ["B-16", "B-8"]
"""L-14 takes minutes a batch there."""
CPU_GOALS = {"B-16": " (goal 1.15x)", "B-8": " (goal 1.3x and 0.6x the memory)"}
ITERATIONS = {"cpu": 1, "cuda": 20}
"""Timed, and averaged, after the warm-up."""
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def main(arguments: Sequence[str]) -> None:
    """Measure and print one line per variant, then the numbers as JSON."""
    options = _options(arguments)
    if options.one:
        print(json.dumps(measure(options)))
        return
    for variant in options.variants:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for repeat in range(options.repeats):
            for kind, found in runs.items():
                command = [*arguments, "--device", options.device, "--variants", variant, "--one", kind]
                label = f"{variant}: run {repeat + 1} of {options.repeats}, {kind}"
                output = run_apart(["benchmarks", "tokenizer", *command], label=label)
                found.append(json.loads(output.splitlines()[-1]))
        print(_comparison(variant, runs, options=options))
        asked = {name: getattr(options, name) for name in ("batch", "device", "precision", "compile")}
        print(json.dumps({"variant": variant, **asked, **runs}))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tokenizer", description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default B-16 B-8, on a GPU L-14 too")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of our side's weights")
    parser.add_argument(
        "--compile", nargs="?", const="reduce-overhead", choices=COMPILE_MODES, metavar="MODE",
        help="torch.compile our side: default, reduce-overhead (CUDA graphs; when no mode is given) or max-autotune",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--image-size", type=int, help="pixels, in place of the variant's own")
    parser.add_argument("--layers", type=int, help="of encoder and decoder, in place of the variant's own")
    parser.add_argument("--one", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_positive(options, "batch", "repeats", "threads", "image_size", "layers")
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or use --device cpu")
    if options.compile and options.device == "cpu" and not _has_compiler():
        raise UserError("--compile needs a C++ compiler on a CPU; install g++, or leave it out")
    options.variants = options.variants or (CPU_VARIANTS if options.device == "cpu" else list(VARIANTS))
    for variant in options.variants:
        size, patch = options.image_size or VARIANTS[variant]["image_size"], VARIANTS[variant]["patch_size"]
        if size % patch:
            raise UserError(f"--image-size is {size}; {variant} needs a multiple of its patch size, {patch}")
    return options


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def _comparison(variant: str, runs: dict[str, list[dict[str, float]]], *, options: argparse.Namespace) -> str:
    ours, plain = (min(runs[kind], key=lambda run: run["seconds"]) for kind in ("ours", "plain"))
    faster = {key: plain[key] / ours[key] for key in ("seconds", "encode", "decode")}
    how = f" in {options.precision}" + (f", compiled ({options.compile})" if options.compile else "")
    line = (
        f"{variant}: {options.batch / ours['seconds']:.2f} images/s{how}, "
        f"plain {options.batch / plain['seconds']:.2f} in float32: {faster['seconds']:.2f}x; "
        f"encode {faster['encode']:.2f}x, decode {faster['decode']:.2f}x"
    )
    if "peak_gib" in ours:
        ratio = ours["peak_gib"] / max(plain["peak_gib"], 1e-6)
        line += f"; memory beside the model {ours['peak_gib']:.2f} GiB, plain {plain['peak_gib']:.2f}: {ratio:.2f}x"
    return line + (CPU_GOALS.get(variant, "") if options.device == "cpu" else "")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of encode and of decode of one batch after a warm-up, and the peak memory they added (GiB).

    The memory is torch's on a GPU and what is resident on a CPU. There it is left out of a compiled run, which needs
    more to compile than to run.
    """
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    plain, gpu = options.one == "plain", options.device == "cuda"
    compiled = bool(options.compile) and not plain
    encode, decode, pixels_BCHW = _build(options)

    def timed(function: Callable[..., torch.Tensor], given: torch.Tensor, *, times: int) -> tuple[float, torch.Tensor]:
        """Seconds of one of `times` calls, and the last one's result."""
        _synchronize(gpu)
        start = time.perf_counter()
        for _ in range(times):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            result = function(given)
        _synchronize(gpu)
        return (time.perf_counter() - start) / times, result.clone()

    def both(pixels: torch.Tensor, *, times: int) -> dict[str, float]:
        encode_s, codes_BN = timed(encode, pixels, times=times)
        decode_s, _ = timed(decode, codes_BN, times=times)
        return {"encode": encode_s, "decode": decode_s, "seconds": encode_s + decode_s}

    with torch.inference_mode():
        # Compiled code is made for one batch size, and a CUDA graph is recorded in the second call.
        whole = gpu or compiled
        both(pixels_BCHW if whole else pixels_BCHW[:1], times=1)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        before = _peak_gib(gpu)
        if whole:
            both(pixels_BCHW, times=2)
        found = both(pixels_BCHW, times=ITERATIONS[options.device])
    return found if compiled and not gpu else found | {"peak_gib": _peak_gib(gpu) - before}


def _build(options: argparse.Namespace) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """(encode, decode, a batch of pixels) of the side and variant asked for."""
    import torch

    from tokenizer import layers
    from tokenizer.configuration import QLIPConfig
    from tokenizer.modeling import QLIPModel

    plain = options.one == "plain"
    torch.manual_seed(0)
    given = {"image_size": options.image_size, "num_hidden_layers": options.layers}
    tower = VARIANTS[options.variants[0]] | {key: value for key, value in given.items() if value}
    vision = tower | {"quantizer_cfg": {"embed_dim": 28}}
    config = QLIPConfig(text_config={"num_hidden_layers": 1}, vision_config=vision, decoder_config=tower)
    dtype = torch.bfloat16 if options.precision == "bf16" and not plain else torch.float32
    # Built in its precision: weights that were float32 at first would leave a peak that hides what a batch adds.
    model = QLIPModel._from_config(config, dtype=dtype).eval().to(options.device, dtype)
    pixels_BCHW = torch.randn(options.batch, 3, tower["image_size"], tower["image_size"]).to(options.device, dtype)
    if plain:
        layers.F = _PlainFunctions(layers.F)  # type: ignore[assignment]
        layers.Linear.forward = torch.nn.Linear.forward  # type: ignore[method-assign,assignment]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.vision_model.quantize(model.vision_model(pixels), entropy=plain).codes_BN

    if options.compile and not plain:
        # Below `decode`, whose look at the codes would cut the graph in two.
        model.decode_quantized = torch.compile(model.decode_quantized, mode=options.compile)
        return torch.compile(encode, mode=options.compile), model.decode, pixels_BCHW
    return encode, model.decode, pixels_BCHW


def _synchronize(gpu: bool) -> None:
    import torch

    if gpu:
        torch.cuda.synchronize()


def _peak_gib(gpu: bool) -> float:
    import torch

    from um3.core.progress import peak_memory_gib

    return torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_memory_gib()


class _PlainFunctions:
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
