"""The app that the commands join, and the options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_MODEL = "runs/demo/um3/model"

Model = Annotated[str, typer.Option("--model", help="Folder of a trained UM3, or a hub id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for the GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per result, for scripts.")]
TextFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read from a file, one per line; - is stdin (the default).")
]
Images = Annotated[list[str], typer.Argument(help="Image files (PNG, JPEG, WEBP, GIF, BMP, TIFF); - is stdin.")]
BatchSize = Annotated[int, typer.Option(help="Number of items that the model processes at once.", min=1)]
MaxNewTokens = Annotated[int, typer.Option(help="Upper limit of new tokens per text.")]
TEMPERATURE = typer.Option(help="0 is greedy, 1 is the model's own distribution.")
TOP_P = typer.Option(help="Keep the most probable entries up to this share; in (0, 1].")
TOP_K = typer.Option(help="Keep only the k most probable entries; 0 keeps all.")
MIN_P = typer.Option(help="Keep entries at least this share as probable as the most probable; 0 keeps all.")
Temperature = Annotated[float, TEMPERATURE]
TopP = Annotated[float, TOP_P]
TopK = Annotated[int, TOP_K]
MinP = Annotated[float, MIN_P]

app = typer.Typer(
    help="UM3: one model for text and images. Without --model, the model that `make demo` trains is used.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(summary: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the app, with its line in the list of commands and examples below its help."""
    lines = "\n".join(f"  {example}" for example in examples)
    return app.command(short_help=summary, epilog=f"\b\nExamples:\n{lines}")  # \b keeps click from joining the lines
