"""Parquet files and sets of the Hugging Face hub as one Arrow table, read at random places.

Small parquet is held in memory; larger files are converted once by `datasets` to Arrow files in its cache
and mapped from there, so memory stays small and any row is a cheap read.
"""

import bisect
import contextlib
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import SetAside
from data_mix.sources.splits import SPLIT_WORDS, choose_rows, part_labels
from um3.core.errors import UserError

IN_MEMORY_BYTES = 512 * 2**20
SPLIT_COLUMN = "split"
FILES = "imagefolder"
"""How `datasets` calls a set whose images are files of their own."""


@dataclass(frozen=True)
class TablePart:
    """The rows of one split of a table. `starts` and `names` give the first row and name of each file of it.

    set_aside: the files that could not be read when it was opened; afterwards none is read.
    has_files: its images may be paths of files that were downloaded with it. Paths in a table of another kind come from
        whoever wrote it, and are not followed.
    """

    table: pa.Table
    rows: np.ndarray
    starts: Sequence[int]
    names: Sequence[str]
    set_aside: SetAside = field(default_factory=lambda: SetAside("table"))
    has_files: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """A name for sample `index` that does not depend on the split: file and row in it."""
        return _row_key(int(self.rows[index]), starts=self.starts, names=self.names)

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell."""
        return self.table.column(column)[int(self.rows[index])].as_py()

    def file(self, path: str) -> Path:
        """The file of an image, where `has_files`."""
        return Path(path)


def find_files(path: str, *, suffix: str | tuple[str, ...], source: str) -> list[Path]:
    """The files named by a file, folder (searched to the bottom) or glob, sorted; UserError when there are none."""
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.name.endswith(suffix) and file.is_file())
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(found) for found in _glob(path) if Path(found).is_file())
    if not files:
        named = suffix if isinstance(suffix, str) else " or ".join(suffix)
        raise UserError(f"source '{source}': no {named} file at '{path}'; give a file, a folder or a glob")
    return files


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)


def open_parquet(path: str, *, source: str, columns: Sequence[str], split: Split, val_fraction: float) -> TablePart:
    """The rows of `split` with `columns`, all of which must exist (see `parquet_schema`).

    Files that cannot be read are tried again and set aside with a warning, unless there are no others (UserError).
    """
    files = find_files(path, suffix=".parquet", source=source)
    has_split = SPLIT_COLUMN in parquet_schema(path, source=source).names
    wanted = list(dict.fromkeys([*columns, *([SPLIT_COLUMN] if has_split else [])]))
    set_aside = SetAside(source)
    try:
        try:
            table, counts = _read(files, columns=wanted)
        except (pa.ArrowException, OSError, ValueError):
            files = [file for file in files if _is_readable(file, columns=wanted, set_aside=set_aside)]
            if not files or not set_aside.reasons:
                raise
            table, counts = _read(files, columns=wanted)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"source '{source}': cannot read parquet at '{path}': {one_line(error)}") from None
    if table.num_rows != sum(counts) or not set(wanted) <= set(table.column_names):
        raise UserError(
            f"source '{source}': the parquet files at '{path}' differ in their columns ({', '.join(wanted)})"
        )
    starts, names = [0, *np.cumsum(counts[:-1]).tolist()], short_names(files, path)
    labels = table.column(SPLIT_COLUMN).to_pylist() if has_split else _labels_of_files(files, counts, path)
    return TablePart(
        table=table,
        rows=choose_rows(
            num_rows=table.num_rows,
            labels=None if labels is None else [str(label) for label in labels],
            key_of=lambda row: _row_key(row, starts=starts, names=names),
            split=split,
            val_fraction=val_fraction,
            where=f"source '{source}' ({path})",
        ),
        starts=starts,
        names=names,
        set_aside=set_aside,
    )


def _read(files: Sequence[Path], *, columns: Sequence[str]) -> tuple[pa.Table, list[int]]:
    """All rows, and how many each file has."""
    counts = [pq.read_metadata(file).num_rows for file in files]
    if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
        return _mapped(files, columns=columns), counts
    tables = [pq.read_table(file, columns=list(columns), partitioning=None) for file in files]
    return pa.concat_tables(tables, promote_options="permissive"), counts


def _is_readable(file: Path, *, columns: Sequence[str], set_aside: SetAside) -> bool:
    """Read a whole file to see whether it can be, one row group at a time; it is set aside if not."""

    def read() -> None:
        with pq.ParquetFile(file) as opened:
            names = [column for column in columns if column in opened.schema_arrow.names]
            for group in range(opened.num_row_groups):
                opened.read_row_group(group, columns=names)

    with contextlib.suppress(BadSample):
        set_aside.read(file, read)
    return file not in set_aside.reasons


def _mapped(files: Sequence[Path], *, columns: Sequence[str]) -> pa.Table:
    """The files as Arrow files mapped into memory; several ranks that ask at once wait for the first."""
    import datasets

    names = [str(file) for file in files]
    try:
        mapped = datasets.load_dataset("parquet", data_files=names, columns=list(columns), split="train")
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    return mapped.with_format("arrow")[:]


def parquet_schema(path: str, *, source: str) -> pa.Schema:
    """The schema of the first file that has one."""
    files = find_files(path, suffix=".parquet", source=source)
    for file in files:
        try:
            return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            reason = f"cannot read parquet '{file}': {one_line(error)}"
    raise UserError(f"source '{source}': {reason}")


HUB_SET = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]+))?")


def looks_like_hub(path: str) -> bool:
    """owner/name, with @revision and :config if wanted, and nothing of that name on this disk."""
    return HUB_SET.fullmatch(path) is not None and not Path(path).exists()


def hub_place(path: str) -> tuple[str, str | None, str | None]:
    """Name, revision (a commit, branch or tag) and config of owner/name@revision:config; None for what is left out.

    Raises:
        UserError: `path` is not of that form.
    """
    if (match := HUB_SET.fullmatch(path)) is None:
        raise UserError(f"'{path}' names no set of the hub; write owner/name, owner/name@revision or owner/name:config")
    name, revision, config = match.groups()
    return name, revision, config


def open_hub(path: str, *, source: str, split: Split, val_fraction: float) -> TablePart:
    """A set of the hub (see `looks_like_hub`), downloaded whole; none of its code is run.

    UserError when it cannot be had (name, network, permission).
    """
    import datasets

    name, revision, config = hub_place(path)
    where = f"source '{source}' (hub set {path})"
    try:
        available = datasets.get_dataset_split_names(name, config, revision=revision)
        wanted, by_hash = part_labels(available, split=split, where=where)
        parts = [datasets.load_dataset(name, config, split=part, revision=revision) for part in sorted(wanted)]
    except UserError:
        raise
    except Exception as error:
        # The hub client raises its own, requests', pyarrow's and the builder's errors for the user's mistakes.
        raise UserError(f"{where}: cannot be opened: {one_line(error)}") from None
    starts = [0, *np.cumsum([len(part) for part in parts[:-1]]).tolist()]
    table = pa.concat_tables([part.with_format("arrow")[:] for part in parts])
    names = [f"{path}/{part}" for part in sorted(wanted)]
    rows = np.arange(table.num_rows)
    if by_hash:
        rows = choose_rows(
            num_rows=table.num_rows,
            labels=None,
            key_of=lambda row: _row_key(row, starts=starts, names=names),
            split=split,
            val_fraction=val_fraction,
            where=where,
        )
    has_files = parts[0].info.builder_name == FILES
    return TablePart(table=table, rows=rows, starts=starts, names=names, has_files=has_files)


def _row_key(row: int, *, starts: Sequence[int], names: Sequence[str]) -> str:
    file = bisect.bisect_right(starts, row) - 1
    return f"{names[file]}#{row - starts[file]}"


def short_names(files: Sequence[Path], path: str) -> list[str]:
    """File names relative to the folder asked for, or else to the deepest one that holds them all.

    So no two files share a name, and moving the data as a whole does not move a sample to the other split.
    """
    root = Path(path)
    if not root.is_dir():
        root = Path(os.path.commonpath([file.parent for file in files]))
    return [file.relative_to(root).as_posix() for file in files]


def _labels_of_files(files: Sequence[Path], counts: Sequence[int], path: str) -> list[str] | None:
    """A label per row from names such as train-00000-of-00002.parquet or val/0.parquet; None unless all have one."""
    labels: list[str] = []
    for name, count in zip(short_names(files, path), counts, strict=True):
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS]
        if len(files) == 1 or not words:
            return None
        labels += [words[0]] * count
    return labels


def one_line(error: Exception) -> str:
    """Type and message, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
