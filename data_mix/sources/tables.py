"""Parquet files and downloaded Hugging Face data sets as Arrow tables with random access, and the columns of images.

Small parquet files are read into memory. Larger ones are copied once to Arrow files in the cache folder, which every
process maps, so memory stays small and any row is a cheap read.
"""

import bisect
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_mix.arrow_files import MappedTable, kept_table, map_arrow, save_arrow
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles, one_line
from data_mix.sources.config import ImageSourceConfig, SourceConfig
from data_mix.sources.files import FILE_KINDS, file_keys, hub_place, list_files
from data_mix.sources.images import CAPTION_FIELDS
from data_mix.splits import SPLIT_WORDS, choose_samples, split_labels
from um3.core.errors import UserError
from um3.core.progress import Progress
from um3.core.text import valid_text

IN_MEMORY_BYTES = 512 * 2**20
ROWS_AT_ONCE = 256  # of images: those of a row group may have more than the 2 GiB that one Arrow array holds
SPLIT_COLUMN = "split"
IMAGE_FOLDER = "imagefolder"  # what `datasets` calls a data set whose images are files of their own
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "photo")
CAPTION_COLUMNS = (*CAPTION_FIELDS, "txt", "sentences", "description", "prompt")
Fits = Callable[[pa.DataType], bool]


class TableSplit:
    """The rows of one split of a data set in tables.

    read_file: reads an image that is a file of its own, downloaded with the table; None for another table, whose paths
    come from its author and are not followed.
    """

    def __init__(
        self,
        config: SourceConfig,
        tables: Mapping[str, "pa.Table | pa.RecordBatch | MappedTable"],
        *,
        split: Split | None,
        labels: Sequence[str] | None = None,
        bad_files: BadFiles | None = None,
        has_names: bool = False,
    ) -> None:
        """tables: by the names of their files. split: of which the rows are chosen by `labels` or the hash of their
        keys; None for all. has_names: the first column names a row in its file, instead of its number."""
        self._names, self._tables = list(tables), list(tables.values())
        self._ends = [0, *itertools.accumulate(map(len, self._tables))]
        self.schema, self.bad_files = self._tables[0].schema, bad_files or BadFiles(config.name)
        self._name_column = self.schema.names[0] if has_names else ""
        self.read_file: Callable[[str], Path] | None = None
        self.rows = np.arange(self._ends[-1])
        if split is not None:
            self.rows = choose_samples(config, self.all_keys(), num_samples=len(self), split=split, labels=labels)

    def __len__(self) -> int:
        return len(self.rows)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the table of a sample, and its row there."""
        row = int(self.rows[index])
        number = bisect.bisect_right(self._ends, row) - 1
        return number, row - self._ends[number]

    def key(self, index: int) -> str:
        """The name of a sample: that of its file and its own there, whatever the split."""
        number, row = self._place(index)
        own = _text(self.value(index, column=self._name_column)) if self._name_column else row
        return f"{self._names[number]}#{own}"

    def all_keys(self, *, separator: str = "#") -> Iterator[str]:
        """The keys of the rows of all splits; with the separator / they are paths."""
        for name, table in zip(self._names, self._tables, strict=True):
            own = map(_text, table.column(self._name_column).to_pylist()) if self._name_column else range(len(table))
            yield from (f"{name}{separator}{own_name}" for own_name in own)

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell; BadSample for text that is not UTF-8."""
        number, row = self._place(index)
        try:
            return self._tables[number].column(column)[row].as_py()
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", detail=f"{self.key(index)}: {error}") from None

    def skip_nulls(self, column: str) -> None:
        """Drop the rows of this split without a value in `column`, and count them."""
        is_null = np.concatenate([table.column(column).is_null().to_numpy() for table in self._tables])[self.rows]
        for index in np.flatnonzero(is_null).tolist():
            self.bad_files.skip_record("null", self.key(index))
        self.rows = self.rows[~is_null]


def open_parquet(config: SourceConfig, *, pick: Callable[[pa.Schema], Iterable[str]], split: Split) -> TableSplit:
    """The rows of `split`, with the columns that `pick` chooses in the schema of all files that can be read."""
    files = list_files(config.path, suffixes=FILE_KINDS["parquet"], source=config.name)
    bad_files = BadFiles(config.name, skip=config.skip_bad_files)
    schemas = dict(bad_files.read_all(files, _read_schema))
    types: dict[str, pa.DataType] = {}
    for field in itertools.chain(*schemas.values()):
        types[field.name] = _common_type(types.get(field.name, pa.null()), field.type)
    columns = list(dict.fromkeys([*filter(None, pick(pa.schema(types))), *({SPLIT_COLUMN} & types.keys())]))
    for file in schemas:
        if missing := set(columns) - set(schemas[file].names):
            raise UserError(f"{config.where}: '{file}' has no column '{missing.pop()}', which other files have")
    is_large = sum(file.stat().st_size for file in schemas) > IN_MEMORY_BYTES
    progress = Progress(len(schemas), label="copying parquet", unit="files") if is_large else None
    schema = pa.schema({column: types[column] for column in columns})
    read = functools.partial(_read, schema=schema, copying=progress)
    tables = dict(bad_files.read_all(list(schemas), read))
    names = file_keys(files, config.path)
    named = {names[file]: table for file, table in tables.items()}
    labels = _labels_of_names(config, named, names=list(names.values()))
    if SPLIT_COLUMN in columns:
        labels = [str(label) for table in tables.values() for label in table.column(SPLIT_COLUMN).to_pylist()]
    return TableSplit(config, named, split=split, labels=labels, bad_files=bad_files)


def _text(name: int | bytes) -> int | str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def _read_schema(file: Path) -> pa.Schema:
    with file.open("rb") as data:  # Arrow opens no path that is not UTF-8
        return pq.ParquetFile(data).schema_arrow


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of a column in all files: without nulls and dictionaries, and large strings for strings of two kinds."""
    second = second.value_type if pa.types.is_dictionary(second) else second
    if pa.types.is_null(first):
        return second
    return pa.large_string() if first != second and holds_text(first) and holds_text(second) else first


def _read(file: Path, *, schema: pa.Schema, copying: Progress | None) -> "pa.Table | MappedTable":
    """All rows of a file: in memory, or with `copying` mapped from a copy that is made once."""
    if copying is None:
        return pa.Table.from_batches(_batches(file, schema), schema)
    # Not `datasets`: it reads row groups whole, but Arrow cannot hold 2 GiB of images in one; it takes names for
    # patterns and the first file for the schema, and it never replaces a damaged copy.

    def copy(path: Path | None) -> MappedTable:
        if path is None:
            raise UserError(f"cannot keep a copy of '{file}'; set UM3_CACHE to a writable folder")
        save_arrow(path, schema, _batches(file, schema))
        copying.advance()
        return MappedTable(path)

    return kept_table("tables", file, str(schema), load=map_arrow, make=copy)


def _batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All rows of a file, some at a time."""
    num_rows = ROWS_AT_ONCE if any(map(_holds_images, schema.types)) else 16 * ROWS_AT_ONCE
    with file.open("rb") as data:
        for batch in pq.ParquetFile(data).iter_batches(num_rows, columns=schema.names):
            yield batch.select(schema.names).cast(schema)


def _labels_of_names(
    config: SourceConfig, tables: Mapping[str, "pa.Table | MappedTable"], *, names: Sequence[str]
) -> list[str] | None:
    """The split of each row, as in train-00000-of-00002.parquet or val/0.parquet; None unless all names have one.

    names: also of files that cannot be read. If none of a split can be, the other split must not be cut in two instead.
    """
    words = {name: [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS] for name in names}
    if len(names) == 1 or not all(words.values()):
        return None
    firsts = {name: first for name, (first, *_) in words.items()}
    if lost := sorted(set(firsts.values()) - {firsts[name] for name in tables}):
        raise UserError(f"{config.where}: no file of its split '{lost[0]}' can be read; repair or delete them")
    return [firsts[name] for name, table in tables.items() for _ in range(len(table))]


@contextlib.contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn the errors of opening a Hugging Face data set into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub client, requests, pyarrow or the builder: a mistake of the user
        problem = f"no file or folder has this path, and no Hugging Face data set could be opened: {one_line(error)}"
        raise UserError(f"{where}: {problem}") from None


def open_hub(config: SourceConfig, *, pick: Callable[[pa.Schema], object], split: Split) -> TableSplit:
    """A Hugging Face data set, downloaded whole; none of its code is run. `pick` checks its schema."""
    import datasets

    name, revision, hub_config = hub_place(config.path)
    with hub_errors(config.where):
        available = datasets.get_dataset_split_names(name, hub_config, revision=revision)
        labels, by_hash = split_labels(available, split=split, where=config.where)
        parts = [datasets.load_dataset(name, hub_config, split=label, revision=revision) for label in sorted(labels)]
    tables = [part.with_format("arrow")[:] for part in parts]
    pick(tables[0].schema)
    files = {f"{config.path}/{label}": table for label, table in zip(sorted(labels), tables, strict=True)}
    rows = TableSplit(config, files, split=split if by_hash else None)
    if not by_hash and (excluded := set(getattr(config, "exclude", ()))):
        # Keys of the other split, which is not loaded, are as good as those of this one.
        rows.rows = rows.rows[[valid_text(key) not in excluded for key in rows.all_keys()]]
        if not len(rows):
            raise UserError(f"{config.where}: exclude leaves no sample of the {split} split; remove keys from it")
    rows.read_file = Path if parts[0].info.builder_name == IMAGE_FOLDER else None
    return rows


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
