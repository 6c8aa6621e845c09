"""The `um3` command: draw, describe, continue, compare and look at pictures and texts with a trained model.

Answers go to stdout, what is going on to stderr. torch and transformers are imported inside the commands: `um3 --help`
and a slip of the finger are answered at once.
"""

from um3.cli import codes, describe, draw, look, serve, write  # noqa: F401 - each adds its commands
from um3.cli.app import app
from um3.core.errors import run_main

__all__ = ["app", "entry_point"]


def entry_point() -> None:
    """The console script."""
    run_main(app)
