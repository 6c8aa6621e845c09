"""Indexes: where the samples of many large files lie, found once and mapped into memory by every process after that.

Small data is looked through at every opening. Of more than CACHED_FROM_BYTES an index is kept in a cache folder, named
after the places, sizes and times of the files: changed files get another. None is kept of data that could not be read
whole.
"""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data_mix.samples import BadSample
from data_mix.sources.bad_files import SetAside
from um3.core.distributed import is_main, wait_for_main
from um3.core.files import atomic_file
from um3.core.progress import Progress

logger = logging.getLogger(__name__)

CACHED_FROM_BYTES = 256 * 2**20
VERSION = 1  # of what is listed


class Listing(NamedTuple):
    """Where the samples of a file lie, and whether it could be read to its end."""

    table: pa.Table
    whole: bool


def open_index(
    files: Sequence[Path], *, kind: str, schema: pa.Schema, listing: Callable[[int, Path], Listing], set_aside: SetAside
) -> pa.Table:
    """What `listing` finds in each file (given its number and path), one after the other; files that cannot be read are
    set aside. For large data a kept table of the same `kind` and files, or the first rank looks for all (a collective
    call)."""
    states = [file.stat() for file in files]
    look = functools.partial(_look, files, schema=schema, listing=listing, set_aside=set_aside)
    if sum(state.st_size for state in states) < CACHED_FROM_BYTES:
        return look().table
    named = [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in zip(files, states, strict=True)]
    digest = hashlib.sha256(repr((VERSION, kind, named)).encode()).hexdigest()[:24]
    path = cache_folder() / "index" / f"{kind}-{digest}.arrow"
    table = _kept(path)
    if table is None and is_main():
        found = look(progress=Progress(len(files), label=f"listing {set_aside.source}", unit="files"))
        table = found.table
        if found.whole:
            _keep(table, path)
    wait_for_main()
    table = _kept(path) if table is None else table
    return look().table if table is None else table


def _look(
    files: Sequence[Path],
    *,
    schema: pa.Schema,
    listing: Callable[[int, Path], Listing],
    set_aside: SetAside,
    progress: Progress | None = None,
) -> Listing:
    tables, num_whole = [schema.empty_table()], 0
    for number, file in enumerate(files):
        with contextlib.suppress(BadSample):
            found = set_aside.read(file, functools.partial(listing, number, file))
            tables.append(found.table)
            num_whole += found.whole
        if progress is not None:
            progress.advance()
    return Listing(pa.concat_tables(tables), whole=num_whole == len(files))


def cache_folder() -> Path:
    """UM3_CACHE, else um3 in XDG_CACHE_HOME or ~/.cache; machines that share it share the indexes."""
    if own := os.environ.get("UM3_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "um3"


def _kept(path: Path) -> pa.Table | None:
    if not path.exists():
        return None
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s is damaged (%s): the data is looked through again", path, error)
        return None


def _keep(table: pa.Table, path: Path) -> None:
    try:
        with (
            atomic_file(path) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table.combine_chunks())
    except OSError as error:
        logger.warning("no index is kept in %s (%s); set UM3_CACHE to a folder of yours", path.parent, error)
    else:
        logger.info("%d samples indexed in %s", len(table), path)
