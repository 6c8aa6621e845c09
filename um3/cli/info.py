"""`um3 info`."""

import json
from typing import Annotated, Any

import typer

from um3.cli.app import DEFAULT_MODEL, JsonOption, command
from um3.cli.model_info import describe_folder
from um3.core.hub import model_folder


@command("Say what a model folder is.", "um3 info runs/demo/um3/model", "um3 info --json | jq .parameters")
def info(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3, or a hub id.")] = DEFAULT_MODEL,
    as_json: JsonOption = False,
) -> None:
    """Say what FOLDER is: sizes, fingerprint of the visual tokenizer, training steps, licences, sampling settings."""
    about = describe_folder(model_folder(folder))
    if as_json:
        typer.echo(json.dumps(about, ensure_ascii=False, indent=2))
        return
    width = max(map(len, about)) + 2
    for name, value in about.items():
        typer.echo(f"{name:<{width}}{_in_words(value)}")


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
