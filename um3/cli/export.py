"""`um3 export`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from um3.cli import options
from um3.core.files import folder_lock


@options.command(
    "Export the text half of a model as a plain language model.", "um3 export runs/demo/um3/model --out exported"
)
def export(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3.")] = options.DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")] = Path("exported"),
) -> None:
    """Write the text half of the UM3 in FOLDER as a plain Llama or Qwen, without visual entries."""
    with folder_lock(out):
        from um3.core.distributed import device
        from um3.core.log import quiet_model_files, setup_logging
        from um3.model.export import export_text_half

        # Saving imports DeepSpeed, which otherwise logs how it searches for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", device().type)
        setup_logging()
        quiet_model_files()
        typer.echo(export_text_half(folder, out=out))
