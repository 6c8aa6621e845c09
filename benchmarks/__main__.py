"""`python -m benchmarks COMMAND ...`: time, memory and FLOPs against the reference implementations."""

from um3.core.commands import Command, run_room

COMMANDS = {
    "tokenizer": Command("benchmarks.tokenizer", "encode and decode against the released forward pass"),
    "training": Command("benchmarks.training", "a step of stages 1 and 2: time, memory, utilisation", named=True),
    "memory": Command("benchmarks.training", "memory of a training step against the batch size", named=True),
    "um3-loss": Command("benchmarks.um3_loss", "a step of UM3 against full-vocabulary logits and cross entropy"),
    "um3-training": Command("benchmarks.um3_training", "a training step of UM3 against transformers' Trainer"),
    "sampling": Command("benchmarks.sampling", "images per second against transformers' generate()"),
    "llamagen": Command("benchmarks.llamagen", "LlamaGen with one position a patch against one an id"),
    "llava": Command("benchmarks.llava", "training steps of LLaVA-7B with random weights: time and memory"),
    "safety": Command("benchmarks.safety", "what saving, guards and metrics cost in UM3's training"),
    "gpu-proof": Command("benchmarks.parts", "the GPU tests and all of these at the paper's sizes", named=True),
    "all": Command("benchmarks.parts", "all of these at a small size on a CPU, with one table", named=True),
    "growth": Command("benchmarks.growth", "what the loaders deliver, and how start-up and memory grow"),
}

if __name__ == "__main__":
    run_room("benchmarks", COMMANDS)
