"""Parquet files and downloaded Hugging Face data sets as one Arrow table with random access, and images in tables.

Small parquet files are read into memory. `datasets` converts larger ones once to Arrow files in its cache and maps
them, so memory stays small and any row is a cheap read.
"""

import bisect
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_mix.retry import one_line
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import ImageSourceConfig, SourceConfig
from data_mix.sources.files import TEXT_KINDS, file_keys, hub_place, list_files
from data_mix.sources.images import CAPTION_FIELDS, ImageReader
from data_mix.splits import SPLIT_WORDS, choose_samples, split_labels
from um3.core.errors import UserError

if TYPE_CHECKING:
    from data_mix.sources.hub_streaming import HubStream

IN_MEMORY_BYTES = 512 * 2**20
SPLIT_COLUMN = "split"
IMAGE_FOLDER = "imagefolder"  # what `datasets` calls a data set whose images are files of their own
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "photo")
CAPTION_COLUMNS = (*CAPTION_FIELDS, "txt", "sentences", "description", "prompt")


class TableSplit:
    """The rows of one split of a table.

    bad_files: the files that could not be read when it was opened; afterwards no file is read.
    read_file: reads an image that is a file of its own, downloaded with the table; None for another table, whose paths
        come from its author and are not followed.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        config: SourceConfig,
        split: Split,
        files: Mapping[str, int],
        labels: Sequence[str] | None = None,
        by_hash: bool,
        bad_files: BadFiles | None = None,
        has_files: bool = False,
    ) -> None:
        """files: names and numbers of rows of its files. labels: the split of each row, else by hash if `by_hash`."""
        self._table, self.schema = table, table.schema
        self.read_file = Path if has_files else None
        self.bad_files = bad_files or BadFiles(config.name)
        self._names, self._starts = list(files), [0, *np.cumsum(list(files.values())).tolist()]
        self._rows = np.arange(table.num_rows)
        if labels is not None or by_hash:
            keys = (f"{name}#{row}" for name, count in files.items() for row in range(count))
            self._rows = choose_samples(config, keys, num_samples=table.num_rows, split=split, labels=labels)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The name of a sample: its file and row, whatever the split."""
        row = int(self._rows[index])
        file = bisect.bisect_right(self._starts, row) - 1
        return f"{self._names[file]}#{row - self._starts[file]}"

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell."""
        return self._table.column(column)[int(self._rows[index])].as_py()


def parquet_schema(config: SourceConfig) -> pa.Schema:
    """The schema of the first file that can be read."""
    for file in list_files(config.path, suffixes=TEXT_KINDS["parquet"], source=config.name):
        try:
            return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            reason = f"cannot read parquet '{file}': {one_line(error)}"
    raise UserError(f"source '{config.name}': {reason}")


def open_parquet(config: SourceConfig, *, columns: Sequence[str], split: Split) -> TableSplit:
    """The rows of `split` with `columns`, which must exist (see `parquet_schema`). Unreadable files are skipped.

    UserError if no file can be read, or if the files have different columns.
    """
    files = list_files(config.path, suffixes=TEXT_KINDS["parquet"], source=config.name)
    has_split = SPLIT_COLUMN in parquet_schema(config).names
    columns = list(dict.fromkeys([*columns, *([SPLIT_COLUMN] if has_split else [])]))
    bad_files = BadFiles(config.name, skip=config.skip_bad_files)
    try:
        try:
            table, counts = _read(files, columns=columns)
        except (pa.ArrowException, OSError, ValueError):
            files = [file for file in files if _is_readable(file, columns=columns, bad_files=bad_files)]
            if not files or not bad_files.reasons:
                raise
            table, counts = _read(files, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"source '{config.name}': cannot read parquet at '{config.path}': {one_line(error)}") from None
    if table.num_rows != sum(counts) or not set(columns) <= set(table.column_names):
        raise UserError(f"{config.where}: the parquet files differ in their columns ({', '.join(columns)})")
    counts_by_name = dict(zip(file_keys(files, config.path), counts, strict=True))
    labels = _labels_of_names(counts_by_name)
    if has_split:
        labels = [str(label) for label in table.column(SPLIT_COLUMN).to_pylist()]
    return TableSplit(
        table, config=config, split=split, files=counts_by_name, labels=labels, by_hash=True, bad_files=bad_files
    )


def _read(files: Sequence[Path], *, columns: Sequence[str]) -> tuple[pa.Table, list[int]]:
    """All rows, and the number of rows of each file."""
    counts = [pq.read_metadata(file).num_rows for file in files]
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        tables = [pq.read_table(file, columns=list(columns), partitioning=None) for file in files]
        return pa.concat_tables(tables, promote_options="permissive"), counts
    import datasets

    names = [str(file) for file in files]
    try:
        # Not on_bad_files="skip": it keeps the rows before the damage and does not say which files it skipped.
        mapped = datasets.load_dataset("parquet", data_files=names, columns=list(columns), split="train")
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    return mapped.with_format("arrow")[:], counts


def _is_readable(file: Path, *, columns: Sequence[str], bad_files: BadFiles) -> bool:
    """Read all row groups of a file; skip the file if that fails."""

    def read() -> None:
        with pq.ParquetFile(file) as parquet:
            names = [column for column in columns if column in parquet.schema_arrow.names]
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group, columns=names)

    with contextlib.suppress(BadSample):
        bad_files.read(file, read)
    return file not in bad_files.reasons


def _labels_of_names(files: Mapping[str, int]) -> list[str] | None:
    """The split of each row, as in train-00000-of-00002.parquet or val/0.parquet; None unless all names have one."""
    words = [[word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS] for name in files]
    if len(files) == 1 or not all(words):
        return None
    return [first for (first, *_), count in zip(words, files.values(), strict=True) for _ in range(count)]


def open_hub(config: SourceConfig, *, split: Split) -> TableSplit:
    """A Hugging Face data set, downloaded whole; none of its code is run. UserError if it cannot be opened."""
    import datasets

    name, revision, hub_config = hub_place(config.path)
    try:
        available = datasets.get_dataset_split_names(name, hub_config, revision=revision)
        labels, by_hash = split_labels(available, split=split, where=config.where)
        parts = [datasets.load_dataset(name, hub_config, split=label, revision=revision) for label in sorted(labels)]
    except UserError:
        raise
    except Exception as error:
        # A mistake of the user ends in an exception of the hub client, requests, pyarrow or the builder.
        raise UserError(f"{config.where}: cannot open the Hugging Face data set: {one_line(error)}") from None
    return TableSplit(
        pa.concat_tables([part.with_format("arrow")[:] for part in parts]),
        config=config,
        split=split,
        files={f"{config.path}/{label}": len(part) for label, part in zip(sorted(labels), parts, strict=True)},
        by_hash=by_hash,
        has_files=parts[0].info.builder_name == IMAGE_FOLDER,
    )


class TableImages(ImageReader):
    """Images and captions in two columns of a table."""

    def __init__(
        self,
        config: ImageSourceConfig,
        rows: "TableSplit | HubStream",
        *,
        size: int,
        image_column: str,
        caption_column: str,
    ) -> None:
        super().__init__(config, size=size)
        self._rows, self.bad_files = rows, rows.bad_files
        self.stream = None if isinstance(rows, TableSplit) else rows
        self._image_column, self._caption_column = image_column, caption_column

    def __len__(self) -> int:
        return len(self._rows)

    def _key(self, index: int) -> str:
        return self._rows.key(index)

    def _image(self, index: int) -> Path | bytes:
        value = self._rows.value(index, column=self._image_column)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not data and path and self._rows.read_file is not None:
            return self._rows.read_file(path)
        if not data:
            raise BadSample("no image", detail=self._key(index))
        return data

    def _captions(self, index: int) -> Any:
        return self._rows.value(index, column=self._caption_column)


def image_columns(config: ImageSourceConfig, schema: pa.Schema, *, classes: bool = False) -> tuple[str, str]:
    """The names of the image and the caption column: those of the config, else found by name and type.

    Without `has_captions` the caption column is empty. With `classes` captions may be whole numbers. UserError if a
    column is missing or of another type, or cannot be found.
    """

    def column(setting: str, words: Sequence[str], fits: Callable[[pa.DataType], bool], expected: str) -> str:
        fitting = {field.name.lower(): field.name for field in schema if fits(field.type)}
        name = getattr(config, setting) or next((fitting[word] for word in words if word in fitting), "")
        if not name and fits is _holds_images and len(fitting) == 1:
            name = next(iter(fitting.values()))
        if not name:
            has_links = fits is _holds_images and {"url", "image_url"} & {name.lower() for name in schema.names}
            remedy = "download its links with img2dataset --output_format webdataset" if has_links else f"set {setting}"
            what, names = setting.replace("_", " "), ", ".join(schema.names)
            raise UserError(f"{config.where}: cannot tell the {what} among {names}; {remedy}")
        check_column(config, schema, name, fits=fits, expected=expected, setting=setting)
        return name

    def is_caption(kind: pa.DataType) -> bool:
        return holds_text(kind, lists=True) or (classes and pa.types.is_integer(kind))

    image = column("image_column", IMAGE_COLUMNS, _holds_images, "image bytes")
    if not config.has_captions:
        return image, ""
    return image, column("caption_column", CAPTION_COLUMNS, is_caption, "text or lists of text")


def check_column(
    config: SourceConfig,
    schema: pa.Schema,
    column: str,
    *,
    fits: Callable[[pa.DataType], bool],
    expected: str,
    setting: str,
) -> None:
    """UserError unless the table has `column` and its type `fits`; the message names the config key `setting`."""
    if column not in schema.names:
        raise UserError(f"{config.where}: no column '{column}' (has: {', '.join(schema.names)}); set {setting}")
    kind = schema.field(column).type
    if not fits(kind):
        raise UserError(f"{config.where}: column '{column}' holds {kind}, not {expected}; set {setting}")


def holds_text(kind: pa.DataType, *, lists: bool = False) -> bool:
    """Whether the values of a column are strings (plain or dictionary-encoded), or with `lists` also lists of them."""
    if pa.types.is_dictionary(kind) or (lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind))):
        return holds_text(kind.value_type, lists=lists)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
