"""`um3 export`."""

import os
from typing import Annotated

import typer

from um3.cli import options


@options.command(
    "Export the text half of a model as a plain language model.", "um3 export runs/demo/um3/model --out exported"
)
def export(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3.")] = options.DEFAULT_MODEL,
    out: Annotated[str, typer.Option(help="Folder to write; it must not exist.")] = "exported",
) -> None:
    """Write the text half of the UM3 in FOLDER as a plain Llama or Qwen, without visual entries."""
    from um3.core.distributed import device
    from um3.core.log import quiet_model_files, setup_logging
    from um3.model.export import export_text_half

    # Saving imports DeepSpeed, which otherwise logs how it searches for an accelerator.
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    setup_logging()
    quiet_model_files()
    typer.echo(export_text_half(folder, out=out))
