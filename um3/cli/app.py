"""The command line's frame: the app that the commands join, and the options that several of them share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_MODEL = "runs/demo/um3/model"

ModelOption = Annotated[str, typer.Option("--model", help="Folder of a trained UM3, or a hub id.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For scripts: one JSON object a result on stdout.")]
FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read them from a file, one a line; - is stdin, as without any.")
]
ImagesArgument = Annotated[
    list[str], typer.Argument(help="Image files (PNG, JPEG, WEBP, GIF, BMP, TIFF); - is one on stdin.")
]
BatchOption = Annotated[int, typer.Option(help="How many the model works on at once.", min=1)]
TokensOption = Annotated[int, typer.Option(help="Longest text to write, in tokens.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest entries up to this share; in (0, 1].")]
MinPOption = Annotated[float, typer.Option(help="Keep what is this share as probable as the likeliest; 0 keeps all.")]
TopKOption = Annotated[int, typer.Option(help="Keep only the k likeliest entries; 0 keeps all.")]

app = typer.Typer(
    help="UM3: one model for text and pictures. Without --model, the model that `make demo` trains is used.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(summary: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the app, with its line in the list of commands and examples below its help."""
    lines = "\n".join(f"  {example}" for example in examples)
    return app.command(short_help=summary, epilog=f"\b\nExamples:\n{lines}")  # \b keeps click from joining the lines
