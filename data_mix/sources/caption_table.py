"""Captions kept apart from their images, by the name of the image's file: what a recaptioning leaves behind."""

import bisect
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from data_mix.sources.tables import find_files
from um3.core.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz")
KEY_COLUMNS = ("key", "image_id", "id", "file_name", "filename", "image")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts")


class CaptionTable:
    """The captions at a path, sorted by key and looked up by halving, so that 11M of them cost their own bytes.

    A key is an image's file name without folders and extension (sa_223750), or a whole number, which stands for the
    name whose digits at the end are it (223750).
    """

    def __init__(self, path: str, *, column: str = "", source: str) -> None:
        """`column`: of the captions, a text or a list of texts; empty to find it by name.

        Raises:
            UserError: no files, files that cannot be read, or no such columns.
        """
        self.where = f"source '{source}': captions '{path}'"
        files = find_files(path, suffix=SUFFIXES, source=source)
        try:
            tables = [_read(str(file)) for file in files]
            key, caption = self._columns(tables[0], caption=column)
            table = pa.concat_tables([table.select([key, caption]) for table in tables], promote_options="permissive")
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{self.where} cannot be read: {' '.join(str(error).split())}") from None
        table = table.drop_null()
        self.is_number = pa.types.is_integer(table.schema.field(key).type)
        keys = table.column(key) if self.is_number else pa.chunked_array([_stems(table.column(key))])
        order = pc.sort_indices(keys)
        self._keys, self._captions = keys.take(order).combine_chunks(), table.column(caption).take(order)

    def _columns(self, table: pa.Table, *, caption: str) -> tuple[str, str]:
        names = table.column_names
        key = next((name for name in KEY_COLUMNS if name in names), "")
        caption = caption or next((name for name in CAPTION_COLUMNS if name in names), "")
        if not key or caption not in names:
            raise UserError(
                f"{self.where} need a column of {', '.join(KEY_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)} (or "
                f"caption_column); there are {', '.join(names)}"
            )
        return key, caption

    def of(self, key: str) -> Any:
        """What is written for a sample's key (SHARD#STEM or a path), None if nothing is."""
        wanted: str | int = PurePosixPath(key.rpartition("#")[2]).name.partition(".")[0]
        if self.is_number:
            digits = str(wanted)[len(str(wanted).rstrip("0123456789")) :]
            wanted = int(digits) if digits else -1
        place = bisect.bisect_left(range(len(self._keys)), wanted, key=lambda row: self._keys[row].as_py())
        if place == len(self._keys) or self._keys[place].as_py() != wanted:
            return None
        return self._captions[place].as_py()


def _read(file: str) -> pa.Table:
    if file.endswith(".parquet"):
        return pq.read_table(file, partitioning=None)
    with pa.input_stream(file, compression="detect") as stream:
        return pyarrow.json.read_json(stream)


def _stems(names: pa.ChunkedArray) -> pa.Array:
    """File names without folders and extension; keys that are none stay as they are."""
    return pa.array([PurePosixPath(str(name)).name.partition(".")[0] for name in names.to_pylist()], pa.string())
