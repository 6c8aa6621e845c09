"""The `um3` command: generate, caption, chat, complete, score and reconstruct with a trained model, or train one.

Results go to stdout, progress to stderr. The commands import torch and transformers only when they need them, so
`um3 --help` and wrong options are answered at once.
"""

import sys

import typer

from um3.cli import chat, doors, generate, images, info, serve  # noqa: F401 - each adds its commands
from um3.cli.options import app
from um3.core.errors import UserError, run_main

__all__ = ["app", "entry_point"]

USAGE_ERROR: type[BaseException] = typer.BadParameter.__mro__[1]
"""The exception of typer for a wrong command line; it has no public name there."""


def entry_point() -> None:
    """The console script."""
    run_main(_run)


def _run() -> None:
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="um3", standalone_mode=False))
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "um3"
        message = error.format_message() if hasattr(error, "format_message") else str(error)  # names the option
        raise UserError(f"{message.replace('Value error, ', '').rstrip('.')}; see {command} --help") from None
