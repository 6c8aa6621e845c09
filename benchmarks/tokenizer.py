"""`python -m benchmarks.tokenizer`: QLIP's encode and decode against a plain transcription of the released code.

The plain one writes every attention matrix out (softmax of Q K^T, then times V) and computes the quantizer's entropy
terms at each encode, as the released inference code does. Same weights, same images, every run in a process of its
own so that its peak memory is its own; runs alternate, and the fastest of each is compared.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

VARIANTS = {"B-16": dict(patch_size=16), "B-8": dict(patch_size=8)}
GOALS = {"B-16": "goal 1.15x", "B-8": "goal 1.3x and 0.6x the memory"}


def main() -> None:
    """Measure and print one line per variant, then the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--one", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    for variant in options.variants:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for repeat in range(options.repeats):
            for kind, found in runs.items():
                print(f"{variant}: run {repeat + 1} of {options.repeats}, {kind}", file=sys.stderr, flush=True)
                found.append(_run(kind, variant=variant))
        best = {kind: min(found, key=lambda run: run["seconds"]) for kind, found in runs.items()}
        ours, plain = best["ours"], best["plain"]
        faster = {key: plain[key] / ours[key] for key in ("seconds", "encode", "decode")}
        memory = ours["peak_gib"] / max(plain["peak_gib"], 1e-6)
        print(
            f"{variant}: {options.batch / ours['seconds']:.2f} images/s, plain {options.batch / plain['seconds']:.2f}: "
            f"{faster['seconds']:.2f}x; encode {faster['encode']:.2f}x, decode {faster['decode']:.2f}x; memory beside "
            f"the model {ours['peak_gib']:.2f} GiB, plain {plain['peak_gib']:.2f}: {memory:.2f}x ({GOALS[variant]})"
        )
        print(json.dumps({"variant": variant, "batch": options.batch, **runs}))


def _run(kind: str, *, variant: str) -> dict[str, float]:
    """One measurement in a process of its own, with the arguments of this one."""
    command = [sys.executable, "-m", "benchmarks.tokenizer", *sys.argv[1:], "--variants", variant, "--one", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of encode and decode of one batch after a warm-up on one image, and the peak memory they added."""
    import torch

    from tokenizer import layers
    from tokenizer.configuration import QLIPConfig
    from tokenizer.modeling import QLIPModel
    from um3.core.progress import peak_memory_gib

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tower = dict(VARIANTS[options.variants[0]], image_size=options.image_size, num_hidden_layers=options.layers)
    vision = tower | {"quantizer_cfg": {"embed_dim": 28}}
    model = QLIPModel(
        QLIPConfig(text_config={"num_hidden_layers": 1}, vision_config=vision, decoder_config=tower)
    ).eval()
    plain = options.one == "plain"
    if plain:
        layers.F = _PlainFunctions(layers.F)  # type: ignore[assignment]
    pixels_BCHW = torch.randn(options.batch, 3, options.image_size, options.image_size)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.vision_model.quantize(model.vision_model(pixels), entropy=plain).codes_BN

    with torch.inference_mode():
        model.decode(encode(pixels_BCHW[:1]))
        before = peak_memory_gib()
        start = time.perf_counter()
        codes_BN = encode(pixels_BCHW)
        middle = time.perf_counter()
        model.decode(codes_BN)
        end = time.perf_counter()
    times = {"encode": middle - start, "decode": end - middle, "seconds": end - start}
    return times | {"peak_gib": peak_memory_gib() - before}


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


if __name__ == "__main__":
    main()
