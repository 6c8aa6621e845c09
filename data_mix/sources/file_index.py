"""Indexes of files: where each sample lies.

Small data is listed whenever it is opened. For more than CACHED_FROM_BYTES, the index of each file is kept in the cache
folder, unless the file could not be read to its end.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.arrow_files import kept_table, load_arrow, save_arrow
from data_mix.samples import Split
from data_mix.sources.bad_files import DAMAGED, BadFiles
from data_mix.sources.config import SourceConfig
from data_mix.sources.files import FILE_KINDS, file_keys, list_files
from data_mix.sources.tables import TableSplit
from um3.core.errors import UserError
from um3.core.progress import Progress

CACHED_FROM_BYTES = 256 * 2**20
COUNTS = b"counts"  # in the metadata of an index: of what is not used

ListFile = Callable[[Path, BadFiles], pa.RecordBatch]  # lists the samples of a file, and counts what it does not list


class FileIndex(TableSplit):
    """Where the samples of one split lie in files: a table for each, of which the first column names the sample."""

    def __init__(
        self,
        config: SourceConfig,
        *,
        kind: str,
        variant: str,
        split: Split,
        list_file: ListFile,
        is_kept: bool = False,
    ) -> None:
        """List the files at `config.path`, or load the indexes kept for this `variant`; UserError without samples.

        is_kept: keep the indexes of small files, too, because listing is more than reading them.
        """
        files = list_files(config.path, suffixes=FILE_KINDS[kind], source=config.name)
        bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        is_large = is_kept or sum(file.stat().st_size for file in files) >= CACHED_FROM_BYTES
        progress = Progress(len(files), label=f"listing {config.name}", unit="files")

        def read(file: Path) -> pa.RecordBatch:
            found = BadFiles(config.name, skip=config.skip_bad_files)

            def make(path: Path | None = None) -> pa.RecordBatch:
                table = list_file(file, found).replace_schema_metadata({COUNTS: json.dumps(found.counts)})
                if path is not None and DAMAGED not in found.counts:
                    save_arrow(path, table.schema, [table])
                    progress.advance()
                return table

            table = kept_table("index", file, variant, found.skip, load=load_arrow, make=make) if is_large else make()
            for reason, (number, where) in json.loads(table.schema.metadata[COUNTS]).items():
                bad_files.count(reason, where, number=number)
            return table

        tables = dict(bad_files.read_all(files, read))
        if not any(map(len, tables.values())):
            counts = bad_files.summary()
            problem = f"no sample in its {len(files)} {kind} files{counts and f' ({counts})'}"
            raise UserError(f"{config.where}: {problem}; check the files and the kind")
        names, self._files = file_keys(files, config.path), list(tables)
        named = {names[file]: table for file, table in tables.items()}
        super().__init__(config, named, split=split, bad_files=bad_files, has_names=True)
        self._columns = [dict(zip(table.schema.names, table.columns, strict=True)) for table in tables.values()]

    def entry(self, index: int, *columns: str) -> tuple[Any, ...]:
        """The file that holds a sample, and the values of `columns`."""
        number, row = self._place(index)
        return self._files[number], *[self._columns[number][name][row].as_py() for name in columns]
