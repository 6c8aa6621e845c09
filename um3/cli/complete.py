"""`um3 complete`: text in, text out."""

from typing import Annotated

import typer

from um3.cli.app import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    FileOption,
    JsonOption,
    MinPOption,
    ModelOption,
    SeedOption,
    TokensOption,
    TopKOption,
    TopPOption,
    command,
)
from um3.cli.inputs import load, print_rows, read_texts


@command(
    "Continue texts.",
    'um3 complete "There is a red" --temperature 0.7 --max-new-tokens 20',
    "um3 complete --file beginnings.txt --json",
)
def complete(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; - reads stdin.")] = None,
    file: FileOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: TopPOption = 0.95,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    max_new_tokens: TokensOption = 64,
    seed: SeedOption = 0,
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Continue TEXTS; no picture can come out of this."""
    wanted = read_texts(texts or [], file=file, what="text")
    written = load(model, device=device).complete(
        wanted,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    found = zip(wanted, written, written.seeds, written.logprobs, strict=True)
    if as_json:
        print_rows([dict(zip(("text", "continuation", "seed", "logprob"), each, strict=True)) for each in found])
    else:
        for text, continuation, *_ in found:
            typer.echo(text + continuation)
