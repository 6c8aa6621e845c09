"""What the benchmark commands share: the command line, an account of what was left out, the file of the result."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eval.scores import Score, write_scores
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.distributed import world_size
from um3.core.errors import UserError
from um3.core.files import sha256_of
from um3.core.log import setup_logging
from um3.core.progress import format_seconds

ConfigT = TypeVar("ConfigT")
NAMED = 5  # examples of each reason that the result keeps


class LeftOut:
    """What was asked for and could not be used, by reason: counted, and named so that it can be mended."""

    def __init__(self, found: dict[str, dict[str, Any]] | None = None) -> None:
        """`found`: what `to_dict` gave, to go on from."""
        self._found = {
            reason: {"count": each["count"], "first": [*each["first"]]} for reason, each in (found or {}).items()
        }

    def add(self, reason: str, name: str) -> None:
        """Count one; `reason` is a short fixed phrase."""
        each = self._found.setdefault(reason, {"count": 0, "first": []})
        each["count"] += 1
        each["first"] += [name] if len(each["first"]) < NAMED else []

    def merge(self, other: "LeftOut") -> None:
        """Count what the other has counted as well."""
        for reason, theirs in other.to_dict().items():
            each = self._found.setdefault(reason, {"count": 0, "first": []})
            each["count"] += theirs["count"]
            each["first"] = [*each["first"], *theirs["first"]][:NAMED]

    @property
    def count(self) -> int:
        """All of them."""
        return sum(each["count"] for each in self._found.values())

    def note(self) -> str:
        """One line; empty when nothing was left out."""
        reasons = [f"{reason} ({each['count']}, such as {each['first'][0]})" for reason, each in self._found.items()]
        return f"{self.count} left out: {'; '.join(reasons)}" if reasons else ""

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Each reason's count and first names, as plain JSON."""
        return self._found


def run_command(
    schema: type[ConfigT], run: Callable[[ConfigT], None], *, name: str, about: str, arguments: Sequence[str]
) -> None:
    """Read `key=value` settings (and a `--config` file) of `schema` from the command line, and run with them."""
    parser = command_parser(f"python -m eval {name}", about, config="optional")
    config, _ = read_config(schema, parser, arguments=arguments)
    setup_logging()
    run(config)


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Lets the processes of a `torchrun` wait for one another; nothing for a single one."""
    if world_size() == 1:
        yield
        return
    from datetime import timedelta

    import torch.distributed as group

    started = not group.is_initialized()
    if started:
        # Ranks meet once, when the last has done its share: that may be days after the first.
        group.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        if started:
            group.destroy_process_group()


def write_result(
    path: str | Path,
    rows: Sequence[Score],
    *,
    config: Any,
    left_out: LeftOut,
    began: float,
    pins: dict[str, Any],
    samples: Any = None,
) -> None:
    """Write the rows with all that they depend on, and print them. `began` is of `time.monotonic`; `pins` names what
    was measured, which no protocol does: the protocols of two models are equal."""
    from um3.core.provenance import commit, machine, versions

    seconds = time.monotonic() - began
    write_scores(
        path,
        rows,
        samples=samples,
        left_out=left_out.to_dict(),
        pins=pins,
        seconds=round(seconds, 1),
        config=to_dict(config),
        commit=commit(),
        versions=versions(),
        machine=machine(),
    )
    absent: dict[str, list[str]] = {}
    for row in rows:
        if row.value is None:
            absent.setdefault(row.note, []).append(row.key)
        else:
            print(f"{row.key:<40}{row.shown():>10}  n={row.n}" + (f"  {row.note}" if row.note else ""))
    for note, keys in absent.items():
        print(f"without a value: {', '.join(keys)}: {note}")
    if left_out.count:
        print(left_out.note())
    print(f"{len(rows)} rows in {format_seconds(seconds)} -> {path}")


def folder_sha256(folder: str | Path) -> str:
    """Names the weights in a model's folder; a hub id, which is none, stands for itself.

    Raises:
        UserError: a folder without weights.
    """
    import hashlib

    if not Path(folder).is_dir():
        return str(folder)
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise UserError(f"no weights (*.safetensors) in {folder}; give the folder of a model")
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]
