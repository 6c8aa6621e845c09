"""Arrow tables that are made of source files once and kept in the cache folder, each in a file with its own checksum.

A small table is read into memory, a large one is mapped. The name of a file is a hash of the path, size and time of its
source and of whatever else it is made of.
"""

import contextlib
import functools
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from um3.core.errors import UserError
from um3.core.files import atomic_file, check_writable, folder_lock, short_hash

logger = logging.getLogger(__name__)

VERSION = 4  # of the format of the files
CRC_BYTES = 4
TableT = TypeVar("TableT")


def cache_folder(kind: str) -> Path:
    """Folder `kind` in $UM3_CACHE, else in um3 in $XDG_CACHE_HOME or ~/.cache; machines may share it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("UM3_CACHE") or home / "um3", kind)


def kept_table(
    kind: str,
    source: Path,
    *made_of: str | bool,
    load: Callable[[Path], TableT | None],
    make: Callable[[Path | None], TableT],
) -> TableT:
    """`load` of the file that is kept for `source` and `made_of`, else `make` of its path, in one process at a time.

    `make` gets None if nothing can be written in the cache folder; a warning says why.
    """
    state = source.stat()
    name = short_hash(VERSION, str(source.resolve()), state.st_size, state.st_mtime_ns, made_of)
    path = cache_folder(kind) / f"{name}.arrow"
    if (table := load(path)) is not None:
        return table
    if not _is_writable(path.parent):
        return make(None)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(path.parent, wait=True))
        except UserError as error:  # another user's lock, or a disk without locks: not a fault of the source
            logger.warning("%s; set UM3_CACHE to another folder", error)
            return make(None)
        table = load(path)
        return make(path) if table is None else table


@functools.cache
def _is_writable(folder: Path) -> bool:
    try:
        check_writable(folder)
    except UserError as error:
        logger.warning("%s; set UM3_CACHE to another folder", error)
        return False
    return True


def save_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file that ends with its own CRC-32, atomically; UserError if that fails, not if `batches` do."""
    source_errors: list[Exception] = []

    def from_source() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            source_errors.append(error)
            raise

    try:
        with atomic_file(path) as partial:
            with pa.ipc.new_file(str(partial), schema) as writer:
                for batch in from_source():
                    writer.write_batch(batch)
            with pa.memory_map(str(partial)) as file:
                crc32 = zlib.crc32(file.read_buffer())
            with partial.open("ab") as file:
                file.write(crc32.to_bytes(CRC_BYTES))
    except OSError as error:
        if error in source_errors:
            raise
        raise UserError(f"cannot write {path}: {error}; set UM3_CACHE to a folder with space") from None


def load_arrow(path: Path) -> pa.RecordBatch | None:
    """The one batch of a file that `save_arrow` wrote, read into memory; None without a file, or for a damaged one."""
    if not path.exists():
        return None
    data = pa.py_buffer(path.read_bytes())
    if not _has_checksum(data):
        logger.warning("%s is damaged; it is made again", path)
        return None
    return pa.ipc.open_file(data[:-CRC_BYTES]).get_batch(0)


def map_arrow(path: Path) -> "MappedTable | None":
    """The mapped table of a file that `save_arrow` wrote; None if there is none, or one that was cut."""
    with contextlib.suppress(OSError, pa.ArrowException):
        return MappedTable(path)
    return None


class MappedTable:
    """A large table, mapped into memory, with the interface of `pa.Table`.

    When the first value is read, the whole file is compared with its checksum (1.3 GiB/s on one core).
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            self._data = file.read_buffer()
        self._path, self._is_checked = path, False
        self._table = pa.ipc.open_file(self._data[:-CRC_BYTES]).read_all()
        self.schema = self._table.schema

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column; UserError if the file has other content than was written, or was cut."""
        is_whole = not is_cut(self._path, len(self._data))
        self._is_checked = is_whole and (self._is_checked or _has_checksum(self._data))
        if not self._is_checked:
            raise UserError(f"{self._path} is damaged; delete it, and the next run makes it again")
        return self._table.column(name)


def is_cut(path: Path, num_bytes: int) -> bool:
    """Whether a mapped file is shorter than it was; reading it past its end would kill the process (SIGBUS)."""
    try:
        return path.stat().st_size < num_bytes
    except FileNotFoundError:  # what is mapped stays
        return False


def _has_checksum(data: pa.Buffer) -> bool:
    return len(data) > CRC_BYTES and zlib.crc32(data[:-CRC_BYTES]) == int.from_bytes(data[-CRC_BYTES:])
