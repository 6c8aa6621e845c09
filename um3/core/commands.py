"""Commands: `python -m ROOM NAME`, and one way for each of them to read its config and settings.

A room lists its commands by name in `__main__.py`; the module of a command is imported only when it is called, so
`--help` and a wrong name are answered at once.
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
    """The file of an experiment: a path as it is, or the name of one that comes with UM3, such as demo.

    Names and paths such as configs/demo.yaml are found in the checkout, and in an installed wheel.
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
    """`module` has a `main(arguments)`; `about` is its line in the room's `--help`.

    A module that serves several commands (`named`) is given the command's name as its first argument.
    """

    module: str
    about: str
    named: bool = False


def run_room(room: str, commands: Mapping[str, Command]) -> None:
    """Run the command that `sys.argv` names, with the remaining arguments; its exit code is the process's."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{command.about}" for name, command in commands.items()]
    parser = argparse.ArgumentParser(
        prog=f"python -m {room}",
        usage=f"python -m {room} COMMAND ...",
        description="\n".join(["commands:", *lines, "", "COMMAND --help lists the options of one."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    command = commands[name]
    arguments = sys.argv[1:] if command.named else sys.argv[2:]
    run_main(lambda: importlib.import_module(command.module).main(arguments))


def command_parser(prog: str, about: str, *, config: str = "") -> argparse.ArgumentParser:
    """A parser with `--config` and `section.key=value` settings; the caller may add options of its own.

    Args:
        prog: the command as it is typed, such as "python -m data_mix encode".
        about: what it does, one line.
        config: "required", "optional", or "" for a command without a config file.
    """
    parser = argparse.ArgumentParser(prog=prog, description=about)
    if config:
        parser.add_argument(
            "--config",
            required=config == "required",
            help="experiment: the name of a file in configs/, such as demo, or a path; this command reads its own section",
        )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over those of the file")
    return parser


def read_config(
    schema: type[ConfigT], parser: argparse.ArgumentParser, *, section: str = "", arguments: Sequence[str]
) -> tuple[ConfigT, argparse.Namespace]:
    """Parse `arguments` and load `schema` from the file's `section` and the settings.

    Raises:
        UserError: as `um3.core.config.load_config`.
    """
    options = parser.parse_intermixed_args(arguments)
    given = getattr(options, "config", None)
    config = load_config(
        schema, path=find_config(given) if given else None, section=section, overrides=options.overrides
    )
    return config, options
