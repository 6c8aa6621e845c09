"""Indexes of large files: where each sample lies, listed once and then mapped into memory by every process.

Small data is listed whenever it is opened. For more than CACHED_FROM_BYTES, the index is kept in the cache folder under
a hash of the files' paths, sizes and times, unless a file could not be read to its end.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.checksums import columns_crc32
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import DAMAGED, BadFiles
from data_mix.sources.config import SourceConfig
from data_mix.sources.files import FILE_KINDS, file_keys, list_files
from data_mix.splits import choose_samples
from um3.core.distributed import is_main, wait_for_main
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash
from um3.core.progress import Progress

logger = logging.getLogger(__name__)

CACHED_FROM_BYTES = 256 * 2**20
VERSION = 3  # of the format of the indexes
COUNTS, CHECKSUM = b"counts", b"crc32"  # in the metadata of an index: of what is not used, and of the columns

ListFile = Callable[[Path, BadFiles], pa.Table]  # lists the samples of a file, and counts what it does not list


class FileIndex:
    """Where the samples of one split lie in many files.

    An entry has the number of its file ("file") and the columns of `schema`, of which the first names the sample in its
    file. rows: the numbers of the entries of this split.
    """

    def __init__(
        self, config: SourceConfig, *, kind: str, variant: str, split: Split, schema: pa.Schema, list_file: ListFile
    ) -> None:
        """List the files of a kind at `config.path`, or load an index of them that was kept for the same `variant`.

        A collective call for large data: the first rank lists the files. UserError if there are no samples.
        """
        suffixes = FILE_KINDS[kind]
        self.bad_files = bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        self.files = list_files(config.path, suffixes=suffixes, source=config.name)
        self._names = file_keys(self.files, config.path)
        self._columns = ["file", schema.names[0]]
        self._schema, self._kind, self._list_file = schema, f"{kind}-{variant}", list_file
        table = self._open()
        if not len(table):
            reasons = [*bad_files.reasons.values(), f"no sample in its {len(self.files)} {' or '.join(suffixes)} files"]
            counts = bad_files.summary()
            raise UserError(f"{config.where}: {reasons[0]}{counts and f' ({counts})'}; check the files and the kind")
        table = table.combine_chunks()  # of a table, this leaves a single mapped chunk where it is
        self._entries = {name: table.column(name).chunk(0) for name in table.column_names}
        self.rows = choose_samples(config, self.all_keys(), num_samples=len(table), split=split)

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, index: int) -> dict[str, Any]:
        """The entry of a sample."""
        row = int(self.rows[index])
        return {name: values[row].as_py() for name, values in self._entries.items()}

    def key(self, index: int) -> str:
        """The key of a sample: the name of its file, and its own."""
        entry = self.entry(index)
        return self._key(*(entry[column] for column in self._columns))

    def _key(self, file: int, name: int | bytes, *, separator: str = "#") -> str:
        own = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
        return f"{self._names[file]}{separator}{own}"

    def all_keys(self, *, separator: str = "#") -> Iterator[str]:
        """The keys of the entries of all splits; with the separator / they are paths."""
        files, names = (self._entries[column] for column in self._columns)
        key = functools.partial(self._key, separator=separator)
        for start in range(0, len(files), 2**16):
            yield from map(key, files.slice(start, 2**16).to_pylist(), names.slice(start, 2**16).to_pylist())

    def _open(self) -> pa.Table:
        states = file_states(self.files)
        if sum(num_bytes for _, num_bytes, _ in states) < CACHED_FROM_BYTES:
            return self._list_all()
        name = short_hash(VERSION, self._kind, self.bad_files.skip, states)
        path = cache_folder() / "index" / f"{self._kind}-{name}.arrow"
        table = load_arrow(path)
        if table is None and is_main():
            table = self._list_all(Progress(len(self.files), label=f"listing {self.bad_files.source}", unit="files"))
            if not self.bad_files.reasons and DAMAGED not in self.bad_files.counts:
                _save(table.replace_schema_metadata({COUNTS: json.dumps(self.bad_files.counts)}), path)
        wait_for_main()
        table = load_arrow(path) if table is None else table
        if table is None:
            return self._list_all()
        counts = json.loads((table.schema.metadata or {}).get(COUNTS, "{}"))
        self.bad_files.counts |= {reason: tuple(count) for reason, count in counts.items()}
        return table

    def _list_all(self, progress: Progress | None = None) -> pa.Table:
        tables = [self._schema.empty_table().add_column(0, "file", pa.array([], pa.int32()))]
        for number, file in enumerate(self.files):
            counts = self.bad_files.counts.copy()

            def list_file(file: Path = file, counts: dict[str, tuple[int, str]] = counts) -> pa.Table:
                self.bad_files.counts = counts.copy()  # without those of a try that failed
                return self._list_file(file, self.bad_files)

            with contextlib.suppress(BadSample):
                table = self.bad_files.read(file, list_file)
                tables.append(table.add_column(0, "file", pa.repeat(pa.scalar(number, pa.int32()), len(table))))
            if progress is not None:
                progress.advance()
        return pa.concat_tables(tables)


def cache_folder() -> Path:
    """$UM3_CACHE, else um3 in $XDG_CACHE_HOME or ~/.cache; machines that share it share the indexes."""
    return Path(os.environ.get("UM3_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "um3"))


def file_states(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of each file."""
    return [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def load_arrow(path: Path) -> pa.Table | None:
    """The mapped table of an Arrow file; None if there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        checksum = (table.schema.metadata or {}).get(CHECKSUM)
        if checksum is not None and checksum != _checksum(table):
            raise pa.ArrowInvalid("its content does not have its checksum")
        return table
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s is damaged (%s); it is made again", path, error)
        return None


def _checksum(table: pa.Table) -> bytes:
    return str(columns_crc32(chunk for column in table.columns for chunk in column.chunks)).encode()


def _save(table: pa.Table, path: Path) -> None:
    try:
        with atomic_file(path) as partial:
            table = table.combine_chunks()
            for _ in range(2):  # first to see the buffers that the format keeps, then with their checksum
                with pa.ipc.new_file(str(partial), table.schema) as writer:
                    writer.write_table(table)
                with pa.memory_map(str(partial)) as file:
                    checksum = _checksum(pa.ipc.open_file(file).read_all())
                table = table.replace_schema_metadata({**(table.schema.metadata or {}), CHECKSUM: checksum})
        logger.info("%d samples indexed in %s", len(table), path)
    except OSError as error:
        logger.warning("cannot keep an index in %s (%s); set UM3_CACHE to a writable folder", path.parent, error)
