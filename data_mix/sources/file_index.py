"""Indexes of large files: where each sample lies, listed once and then mapped into memory by every process.

Small data is listed whenever it is opened. For more than CACHED_FROM_BYTES, the index is kept in the cache folder under
a hash of the files' paths, sizes and times. An index is not kept if a file could not be read to its end.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import SourceConfig
from data_mix.sources.files import file_keys, list_files
from data_mix.splits import choose_samples
from um3.core.distributed import is_main, wait_for_main
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash
from um3.core.progress import Progress

logger = logging.getLogger(__name__)

CACHED_FROM_BYTES = 256 * 2**20
VERSION = 2  # of the format of the indexes


class Listing(NamedTuple):
    """Where the samples of files lie, and whether the files could be read to their ends."""

    table: pa.Table
    is_whole: bool


class FileIndex:
    """Where the samples of one split lie in many files.

    An entry has the number of its file ("file") and the columns of `schema`, of which the first names the sample in its
    file; it is null for a blank sample. Unreadable files and blank samples are skipped with a warning.
    """

    def __init__(
        self,
        config: SourceConfig,
        *,
        split: Split,
        suffixes: Sequence[str],
        schema: pa.Schema,
        kind: str,
        list_file: Callable[[Path], Listing],
        bad_files: BadFiles,
    ) -> None:
        """List the files at `config.path` with `list_file`, or load a kept index of the same `kind` and files.

        A collective call for large data: the first rank lists the files. UserError if there are no samples.
        """
        self.files = list_files(config.path, suffixes=suffixes, source=config.name)
        self._names = file_keys(self.files, config.path)
        self._columns = ["file", schema.names[0]]
        self._schema, self._kind, self._list_file, self._bad_files = schema, kind, list_file, bad_files
        table = self._open()
        num_blank = table.column(self._columns[1]).null_count
        if num_blank:
            logger.warning("source '%s': skipping %d blank samples", config.name, num_blank)
            table = table.filter(table.column(self._columns[1]).is_valid())
        if not len(table):
            reasons = [*bad_files.reasons.values(), f"no sample in its {len(self.files)} {' or '.join(suffixes)} files"]
            raise UserError(f"{config.where}: {reasons[0]}; check the files and the kind")
        table = table.combine_chunks()  # of a table, this leaves a single mapped chunk where it is
        self._entries = {name: table.column(name).chunk(0) for name in table.column_names}
        self._rows = choose_samples(config, self._keys(table), num_samples=len(table), split=split)

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, index: int) -> dict[str, Any]:
        """The entry of a sample."""
        row = int(self._rows[index])
        return {name: values[row].as_py() for name, values in self._entries.items()}

    def key(self, index: int) -> str:
        """The key of a sample: the name of its file, and its own."""
        row = int(self._rows[index])
        return self._key(*(self._entries[column][row].as_py() for column in self._columns))

    def _key(self, file: int, name: int | bytes) -> str:
        return f"{self._names[file]}#{name.decode('utf-8', 'surrogateescape') if isinstance(name, bytes) else name}"

    def _keys(self, table: pa.Table) -> Iterator[str]:
        for batch in table.select(self._columns).to_batches(max_chunksize=2**16):
            yield from map(self._key, *(column.to_pylist() for column in batch.columns))

    def _open(self) -> pa.Table:
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        if sum(num_bytes for _, num_bytes, _ in states) < CACHED_FROM_BYTES:
            return self._list_all().table
        path = cache_folder() / "index" / f"{self._kind}-{short_hash(VERSION, self._kind, states)}.arrow"
        table = _load(path)
        if table is None and is_main():
            progress = Progress(len(self.files), label=f"listing {self._bad_files.source}", unit="files")
            table, is_whole = self._list_all(progress)
            if is_whole:
                _save(table, path)
        wait_for_main()
        table = _load(path) if table is None else table
        return self._list_all().table if table is None else table

    def _list_all(self, progress: Progress | None = None) -> Listing:
        tables, is_whole = [], True
        for number, file in enumerate(self.files):
            listing = Listing(self._schema.empty_table(), is_whole=False)
            with contextlib.suppress(BadSample):
                listing = self._bad_files.read(file, lambda file=file: self._list_file(file))  # type: ignore[misc]
            numbers = pa.repeat(pa.scalar(number, pa.int32()), len(listing.table))
            tables.append(listing.table.add_column(0, "file", numbers))
            is_whole &= listing.is_whole
            if progress is not None:
                progress.advance()
        return Listing(pa.concat_tables(tables), is_whole)


def cache_folder() -> Path:
    """$UM3_CACHE, else um3 in $XDG_CACHE_HOME or ~/.cache; machines that share it share the indexes."""
    if folder := os.environ.get("UM3_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "um3"


def _load(path: Path) -> pa.Table | None:
    if not path.exists():
        return None
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        logger.warning("the index %s is damaged (%s); listing the files again", path, error)
        return None


def _save(table: pa.Table, path: Path) -> None:
    try:
        with atomic_file(path) as partial, pa.ipc.new_file(str(partial), table.schema) as writer:
            writer.write_table(table.combine_chunks())
    except OSError as error:
        logger.warning("cannot keep an index in %s (%s); set UM3_CACHE to a writable folder", path.parent, error)
    else:
        logger.info("%d samples indexed in %s", len(table), path)
