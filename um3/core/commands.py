"""Commands: `python -m ROOM NAME`, listed in the room's `__main__.py`, and how they read a config and settings.

The module of a command is imported only when the command runs, so `--help` and a wrong name are answered at once.
"""

import importlib
import os
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from um3.core.config import load_config, unknown_key
from um3.core.errors import UserError, run_main
from um3.core.log import quiet_bars_in_logs

ConfigT = TypeVar("ConfigT")
PROGRAM = "UM3_PROGRAM"
"""Environment variable: the name under which a command was started, if not `python -m ROOM NAME`."""


def find_config(path_or_name: str) -> Path:
    """An existing path, or the file of a name such as demo or configs/demo.yaml in the checkout or installed wheel.

    UserError for a name that no experiment has; it lists those that there are.
    """
    path, package = Path(path_or_name), Path(__file__).parents[1]
    if path.exists() or str(path.parent) not in (".", "configs"):
        return path
    name = path.name if path.suffix else f"{path.name}.yaml"
    folders = [folder / "configs" for folder in (package.parent, package / "_rooms")]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    remedy = f"set --config (make: CONFIG=) to a YAML file, or to one of {', '.join(names)}"
    raise UserError(f"no experiment is called '{path_or_name}'; {remedy}")


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
    about = "\n".join(["commands:", *lines, "", "COMMAND --help lists the options of a command."])
    program = os.environ.get(PROGRAM, f"python -m {room}")
    parser = ArgumentParser(program, f"{program} COMMAND ...", about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands, help=SUPPRESS)
    command = commands[parser.parse_args(sys.argv[1:2] or ["--help"]).command]
    quiet_bars_in_logs()
    arguments = sys.argv[1:] if command.named else sys.argv[2:]
    run_main(lambda: importlib.import_module(command.module).main(arguments))


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def command_parser(prog: str, about: str, *, config: str = "") -> ArgumentParser:
    """A parser with `--config` ("required", "optional", or "" for none) and `section.key=value` settings."""
    parser = ArgumentParser(prog=os.environ.pop(PROGRAM, prog), description=about)
    if config:
        help_ = "experiment: the name of a file in configs/, such as demo, or a path; a command reads its section"
        parser.add_argument("--config", required=config == "required", help=help_)
        help_ = "skip settings that only other phases have; SECTION.key=value is for one phase"
        parser.add_argument("--shared", action="store_true", help=help_)
    help_ = "settings that override those of the file"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=help_)
    return parser


def read_config(
    schema: type[ConfigT], parser: ArgumentParser, *, section: str = "", arguments: Sequence[str], partial: bool = False
) -> tuple[ConfigT, Namespace]:
    """Parse `arguments`; load `schema` (`um3.core.config.load_config`) from the config file and the settings."""
    options = parser.parse_intermixed_args(arguments)
    path, settings = find_config(options.config) if getattr(options, "config", None) else None, options.overrides
    if getattr(options, "shared", False):
        settings = settings_of(schema, settings, section=section)
    return load_config(schema, path=path, section=section, overrides=settings, partial=partial), options


def settings_of(schema: type[Any], settings: Sequence[str], *, section: str) -> list[str]:
    """Those of the settings that all phases share that the phase of `section`, described by `schema`, has."""
    return [own for setting in settings if not unknown_key(schema, own := setting_for(section, setting))]


def setting_for(section: str, setting: str) -> str:
    """A setting that all phases share as the phase of `section` reads it: without its own name in front."""
    return setting.removeprefix(f"{section}.")
