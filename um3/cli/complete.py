"""`um3 complete`: text in, text out."""

from typing import Annotated

import typer

from um3.cli import options
from um3.cli.inputs import load, read_texts, show


@options.command(
    "Continue texts.",
    'um3 complete "There is a red" --temperature 0.7 --max-new-tokens 20',
    "um3 complete --file beginnings.txt --json",
)
def complete(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; - reads stdin.")] = None,
    file: options.TextFile = None,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    max_new_tokens: options.MaxNewTokens = 64,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
) -> None:
    """Continue TEXTS. The model writes text only, no images."""
    texts = read_texts(texts, file=file, kind="text")
    written = load(model, device=device).complete(
        texts,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    show(
        {"text": texts, "continuation": written, "seed": written.seeds, "logprob": written.logprobs},
        "{text}{continuation}",
        as_json=as_json,
    )
