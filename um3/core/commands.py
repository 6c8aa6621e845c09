"""Commands: `python -m ROOM NAME`, and one way for all of them to read a config and settings.

The `__main__.py` of a room lists its commands by name. The module of a command is imported only when the command
runs, so `--help` and a wrong name are answered at once.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from um3.core.config import load_config
from um3.core.errors import run_main

ConfigT = TypeVar("ConfigT")


def find_config(path_or_name: str) -> Path:
    """The file of an experiment: an existing path, or the file of a name such as demo or configs/demo.yaml.

    Names are searched in the checkout and in an installed wheel.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    name = path.name if path.suffix else f"{path.name}.yaml"
    package = Path(__file__).parents[1]
    candidates = (package.parent / "configs" / name, package / "_rooms" / "configs" / name)
    is_ours = str(path.parent) in (".", "configs")
    return next((candidate for candidate in candidates if is_ours and candidate.is_file()), path)


class Command(NamedTuple):
    """A command of a room: `module` has a `main(arguments)`, `about` is its line in the room's `--help`.

    A module that serves several commands (`named`) receives the name of the command as its first argument.
    """

    module: str
    about: str
    named: bool = False


def run_room(room: str, commands: Mapping[str, Command]) -> None:
    """Run the command that `sys.argv` names with the remaining arguments; exit with its exit code."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{command.about}" for name, command in commands.items()]
    parser = argparse.ArgumentParser(
        prog=f"python -m {room}",
        usage=f"python -m {room} COMMAND ...",
        description="\n".join(["commands:", *lines, "", "COMMAND --help lists the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    command = commands[name]
    arguments = sys.argv[1:] if command.named else sys.argv[2:]
    run_main(lambda: importlib.import_module(command.module).main(arguments))


def command_parser(prog: str, about: str, *, config: str = "") -> argparse.ArgumentParser:
    """A parser with `--config` and `section.key=value` settings; the caller may add options.

    Args:
        prog: the command as the user types it, such as "python -m data_mix encode".
        about: one line that says what the command does.
        config: "required", "optional", or "" for a command without a config file.
    """
    parser = argparse.ArgumentParser(prog=prog, description=about)
    if config:
        about_config = (
            "experiment: the name of a file in configs/, such as demo, or a path; a command reads its section"
        )
        parser.add_argument("--config", required=config == "required", help=about_config)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override those of the file"
    )
    return parser


def read_config(
    schema: type[ConfigT],
    parser: argparse.ArgumentParser,
    *,
    section: str = "",
    arguments: Sequence[str],
    partial: bool = False,
) -> tuple[ConfigT, argparse.Namespace]:
    """Parse `arguments`; load `schema` from the `section` of the config file and the settings.

    Raises:
        UserError: see `um3.core.config.load_config`.
    """
    options = parser.parse_intermixed_args(arguments)
    name = getattr(options, "config", None)
    path = find_config(name) if name else None
    return load_config(schema, path=path, section=section, overrides=options.overrides, partial=partial), options
