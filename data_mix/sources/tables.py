"""Parquet files and downloaded Hugging Face data sets as one Arrow table with random access, and images in tables.

Small parquet files are read into memory. Larger ones are copied once to an Arrow file in the cache folder, which every
process maps, so memory stays small and any row is a cheap read.
"""

import bisect
import contextlib
import fcntl
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_mix.retry import one_line
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import ImageSourceConfig, SourceConfig
from data_mix.sources.file_index import cache_folder, file_states, load_arrow
from data_mix.sources.files import FILE_KINDS, file_keys, hub_place, list_files
from data_mix.sources.images import CAPTION_FIELDS, ImageReader
from data_mix.splits import SPLIT_WORDS, choose_samples, split_labels
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash
from um3.core.progress import Progress

if TYPE_CHECKING:
    from data_mix.sources.hub_streaming import HubStream

IN_MEMORY_BYTES = 512 * 2**20
ROWS_AT_ONCE = 256  # of images: those of a row group may have more than the 2 GiB that one Arrow array holds
SPLIT_COLUMN = "split"
IMAGE_FOLDER = "imagefolder"  # what `datasets` calls a data set whose images are files of their own
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "photo")
CAPTION_COLUMNS = (*CAPTION_FIELDS, "txt", "sentences", "description", "prompt")
Fits = Callable[[pa.DataType], bool]


class TableSplit:
    """The rows of one split of a table, of which no file is read after it was opened.

    read_file: reads an image that is a file of its own, downloaded with the table; None for another table, whose paths
    come from its author and are not followed.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray, *, files: Mapping[str, int], bad_files: BadFiles) -> None:
        """rows: the numbers of the rows of the split. files: names and numbers of rows of the table's files."""
        self._table, self.schema, self._rows, self.bad_files = table, table.schema, rows, bad_files
        self.read_file: Callable[[str], Path] | None = None
        self._names, self._starts = list(files), [0, *np.cumsum(list(files.values())).tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The name of a sample: its file and row, whatever the split."""
        row = int(self._rows[index])
        file = bisect.bisect_right(self._starts, row) - 1
        return f"{self._names[file]}#{row - self._starts[file]}"

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell; BadSample for text that is not UTF-8."""
        try:
            return self._table.column(column)[int(self._rows[index])].as_py()
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", detail=f"{self.key(index)}: {error}") from None

    def skip_nulls(self, column: str) -> None:
        """Drop the rows of this split without a value in `column`, and count them."""
        is_null = self._table.column(column).is_null().to_numpy()[self._rows]
        if is_null.any():
            where = self.key(int(is_null.argmax()))
            self.bad_files.skip_record("null", where)
            self.bad_files.count("null", where, number=int(is_null.sum()) - 1)
            self._rows = self._rows[~is_null]


def open_parquet(config: SourceConfig, *, pick: Callable[[pa.Schema], Iterable[str]], split: Split) -> TableSplit:
    """The rows of `split`, with the columns that `pick` chooses in the schema of all files that can be read."""
    files = list_files(config.path, suffixes=FILE_KINDS["parquet"], source=config.name)
    bad_files = BadFiles(config.name, skip=config.skip_bad_files)
    schemas: dict[Path, pa.Schema] = {}
    num_rows: dict[Path, int] = {}
    types: dict[str, pa.DataType] = {}
    for file in files:
        with contextlib.suppress(BadSample):
            schemas[file], num_rows[file] = bad_files.read(file, functools.partial(_read_footer, file))
            for field in schemas[file]:
                types[field.name] = _common_type(types.get(field.name, pa.null()), field.type)
    if not schemas:
        raise UserError(f"source '{config.name}': cannot read parquet: {bad_files.reasons[files[0]]}")
    columns = list(dict.fromkeys([*filter(None, pick(pa.schema(types))), *({SPLIT_COLUMN} & types.keys())]))
    schema = pa.schema({column: types[column] for column in columns})
    for file in schemas:
        if missing := set(columns) - set(schemas[file].names):
            raise UserError(f"{config.where}: '{file}' has no column '{missing.pop()}', which other files have")
    files = list(schemas)
    try:
        try:
            table = _read(files, schema=schema)
        except (pa.ArrowException, OSError, ValueError):
            for file in files:
                with contextlib.suppress(BadSample):
                    bad_files.read(file, lambda file=file: sum(len(batch) for batch in _batches(file, schema)))  # type: ignore[misc]
            files = [file for file in files if file not in bad_files.reasons]
            if len(files) in (0, len(schemas)):
                raise
            table = _read(files, schema=schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"source '{config.name}': cannot read parquet at '{config.path}': {one_line(error)}") from None
    counts = dict(zip(file_keys(files, config.path), (num_rows[file] for file in files), strict=True))
    labels = _labels_of_names(counts)
    if SPLIT_COLUMN in columns:
        labels = [str(label) for label in table.column(SPLIT_COLUMN).to_pylist()]
    rows = choose_samples(config, _keys(counts), num_samples=len(table), split=split, labels=labels)
    return TableSplit(table, rows, files=counts, bad_files=bad_files)


def _keys(files: Mapping[str, int]) -> Iterator[str]:
    return (f"{name}#{row}" for name, num_rows in files.items() for row in range(num_rows))


def _read_footer(file: Path) -> tuple[pa.Schema, int]:
    with file.open("rb") as data:  # Arrow opens no path that is not UTF-8
        parquet = pq.ParquetFile(data)
        return parquet.schema_arrow, parquet.metadata.num_rows


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of a column in all files: without nulls and dictionaries, and large strings for strings of two kinds."""
    second = second.value_type if pa.types.is_dictionary(second) else second
    if pa.types.is_null(first):
        return second
    return pa.large_string() if first != second and holds_text(first) and holds_text(second) else first


def _read(files: Sequence[Path], *, schema: pa.Schema) -> pa.Table:
    """All rows of all files: in memory, or mapped from a copy that is made once."""
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        return pa.Table.from_batches((batch for file in files for batch in _batches(file, schema)), schema)
    # Not `datasets`: it reads row groups whole, but Arrow cannot hold 2 GiB of images in one; it takes names for
    # patterns and the first file for the schema, and it never replaces a damaged copy.
    path = cache_folder() / "tables" / f"{short_hash(file_states(files), str(schema))}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = load_arrow(path)
        if table is None:
            progress = Progress(len(files), label="copying parquet", unit="files")
            with atomic_file(path) as partial, pa.ipc.new_file(str(partial), schema) as writer:
                for file in files:
                    for batch in _batches(file, schema):
                        writer.write_batch(batch)
                    progress.advance()
            table = load_arrow(path)
    return table


def _batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All rows of a file, some at a time."""
    num_rows = ROWS_AT_ONCE if any(map(_holds_images, schema.types)) else 16 * ROWS_AT_ONCE
    with file.open("rb") as data:
        for batch in pq.ParquetFile(data).iter_batches(num_rows, columns=schema.names):
            yield batch.select(schema.names).cast(schema)


def _labels_of_names(files: Mapping[str, int]) -> list[str] | None:
    """The split of each row, as in train-00000-of-00002.parquet or val/0.parquet; None unless all names have one."""
    words = [[word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS] for name in files]
    if len(files) == 1 or not all(words):
        return None
    return [first for (first, *_), count in zip(words, files.values(), strict=True) for _ in range(count)]


def open_hub(config: SourceConfig, *, pick: Callable[[pa.Schema], object], split: Split) -> TableSplit:
    """A Hugging Face data set, downloaded whole; none of its code is run. `pick` checks its schema."""
    import datasets

    name, revision, hub_config = hub_place(config.path)
    try:
        available = datasets.get_dataset_split_names(name, hub_config, revision=revision)
        labels, by_hash = split_labels(available, split=split, where=config.where)
        parts = [datasets.load_dataset(name, hub_config, split=label, revision=revision) for label in sorted(labels)]
    except UserError:
        raise
    except Exception as error:  # of the hub client, requests, pyarrow or the builder: a mistake of the user
        raise UserError(f"{config.where}: cannot open the Hugging Face data set: {one_line(error)}") from None
    table = pa.concat_tables([part.with_format("arrow")[:] for part in parts])
    pick(table.schema)
    files = {f"{config.path}/{label}": len(part) for label, part in zip(sorted(labels), parts, strict=True)}
    chosen = np.arange(len(table))
    if by_hash:
        chosen = choose_samples(config, _keys(files), num_samples=len(table), split=split)
    rows = TableSplit(table, chosen, files=files, bad_files=BadFiles(config.name))
    rows.read_file = Path if parts[0].info.builder_name == IMAGE_FOLDER else None
    return rows


class TableImages(ImageReader):
    """Images and captions in two columns of a table."""

    def __init__(
        self, config: ImageSourceConfig, rows: "TableSplit | HubStream", *, size: int, columns: tuple[str, str]
    ) -> None:
        super().__init__(config, size=size)
        self._rows, self.bad_files = rows, rows.bad_files
        self.stream = None if isinstance(rows, TableSplit) else rows
        self._image_column, self._caption_column = columns

    def _image(self, index: int) -> Path | bytes:
        value = self._rows.value(index, column=self._image_column)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not data and path and self._rows.read_file is not None:
            return cast(Path | bytes, self._rows.read_file(path))
        if not data:
            raise BadSample("no image", detail=self._key(index))
        return data

    def _captions(self, index: int) -> Any:
        return self._rows.value(index, column=self._caption_column)


def image_columns(config: ImageSourceConfig, schema: pa.Schema, *, classes: bool = False) -> tuple[str, str]:
    """The names of the image and the caption column ("" without `has_captions`), else found by name and type.

    With `classes` captions may be whole numbers. UserError if a column is missing, of another type or cannot be found.
    """

    def column(setting: str, words: Sequence[str], fits: Fits, expected: str) -> str:
        fitting = {field.name.lower(): field.name for field in schema if fits(field.type)}
        name = getattr(config, setting) or next((fitting[word] for word in words if word in fitting), "")
        if fits is _holds_images and len(fitting) == 1:
            name = name or next(iter(fitting.values()))
        if not name:
            has_links = fits is _holds_images and {"url", "image_url"} & {name.lower() for name in schema.names}
            remedy = "download its links with img2dataset --output_format webdataset" if has_links else f"set {setting}"
            tried = f"the {setting.replace('_', ' ')} among {', '.join(schema.names)}"
            raise UserError(f"{config.where}: cannot tell {tried}; {remedy}")
        return check_column(config, schema, column=name, fits=fits, expected=expected, setting=setting)[0]

    def is_caption(kind: pa.DataType) -> bool:
        return holds_text(kind, lists=True) or (classes and pa.types.is_integer(kind))

    image = column("image_column", IMAGE_COLUMNS, _holds_images, "image bytes")
    if not config.has_captions:
        return image, ""
    return image, column("caption_column", CAPTION_COLUMNS, is_caption, "text or lists of text")


def check_column(
    config: SourceConfig, schema: pa.Schema, *, column: str, fits: Fits, expected: str, setting: str
) -> tuple[str]:
    """`column`; UserError unless the table has it and its type `fits`. `setting`: its config key, for messages."""
    if column not in schema.names:
        raise UserError(f"{config.where}: no column '{column}' (has: {', '.join(schema.names)}); set {setting}")
    kind = schema.field(column).type
    if not fits(kind):
        raise UserError(f"{config.where}: column '{column}' holds {kind}, not {expected}; set {setting}")
    return (column,)


def holds_text(kind: pa.DataType, *, lists: bool = False) -> bool:
    """Whether the values of a column are strings (plain or dictionary-encoded), or with `lists` also lists of them."""
    if pa.types.is_dictionary(kind) or (lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind))):
        return holds_text(kind.value_type, lists=lists)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
