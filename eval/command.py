"""What the commands of evaluation share: the command line, the count of skipped items, names of models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from um3.core.commands import command_parser, read_config
from um3.core.distributed import take_gpu, world_size
from um3.core.errors import UserError
from um3.core.files import sha256_of, short_hash, walk_files
from um3.core.log import setup_logging

ConfigT = TypeVar("ConfigT")
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Files of a model's folder that its outputs depend on."""
MAX_EXAMPLES = 5  # names of skipped items that a result keeps for each reason


class SkipCounter:
    """Counts the requested items that could not be used, by reason, with the first names of each reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one item; `reason` is a short fixed phrase."""
        entry = self._reasons.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        entry["first"] += [name] if len(entry["first"]) < MAX_EXAMPLES else []

    @property
    def count(self) -> int:
        """All skipped items."""
        return sum(entry["count"] for entry in self._reasons.values())

    def note(self) -> str:
        """One line with every reason; empty if nothing was skipped."""
        reasons = [f"{name} ({entry['count']}, such as {entry['first'][0]})" for name, entry in self._reasons.items()]
        return f"{self.count} skipped: {'; '.join(reasons)}" if reasons else ""

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The count and first names of each reason, as plain JSON."""
        return self._reasons


def run_command(
    schema: type[ConfigT], run: Callable[[ConfigT], None], *, name: str, about: str, arguments: Sequence[str]
) -> None:
    """Read `key=value` settings (and a `--config` file) of `schema` from the command line and call `run` with them."""
    parser = command_parser(f"python -m eval {name}", about, config="optional")
    config, _ = read_config(schema, parser, arguments=arguments)
    setup_logging()
    if world_size() > 1:
        take_gpu()
    run(config)


def model_hash(folder_or_hub_id: str | Path) -> str:
    """Names the content of a model's folder; a hub id stands for itself. UserError for a folder without weights."""
    if not Path(folder_or_hub_id).is_dir():
        return str(folder_or_hub_id)
    files = walk_files(folder_or_hub_id, suffixes=MODEL_SUFFIXES)
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"no weights (*.safetensors) in {folder_or_hub_id}; set it to the folder of a model")
    return short_hash(*([file.relative_to(folder_or_hub_id).as_posix(), sha256_of(file)] for file in files))
