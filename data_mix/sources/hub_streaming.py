"""Hugging Face data sets, streamed file after file in their own order, without a download of the whole data set.

Reading in order reads every byte once. To resume, keep `HubStream.state()` beside what was made of the samples: the
next process starts with the file in which the last one stopped.
"""

import bisect
import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import UNREADABLE, BadFiles, one_line, retry
from data_mix.sources.config import SourceConfig
from data_mix.sources.files import hub_place
from data_mix.sources.tables import IMAGE_FOLDER, ROWS_AT_ONCE, TableSplit, hub_errors, open_hub, open_parquet
from data_mix.splits import split_labels
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.images import MAX_FILE_BYTES

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

SCHEMA_ROWS = 100  # the first rows give the columns of a data set that does not describe them
HOW_TO_RESUME = "finished work is kept; run the same command again to resume"


class PastTheEnd(BadSample):
    """The data set has fewer rows than `stream`."""


class HubFiles(NamedTuple):
    """The files of one split of a data set, in order. first: the row of the data set at which the split begins; digest:
    short hash of the files (those of the hub by their commit)."""

    label: str
    parts: Sequence["IterableDataset"]
    names: Sequence[str]
    digest: str
    schema: pa.Schema
    first: int
    has_files: bool

    def rows(self, file: int) -> "IterableDataset":
        """The rows of one file, made on demand: each of these objects holds a list of all files."""
        for part in self.parts:
            if file < part.num_shards:
                return part.shard(part.num_shards, file)
            file -= part.num_shards
        raise IndexError(f"file {file} past the last one")


# Not `state_dict` of `datasets`: it resumes one reader at one position and cannot skip a file. A file's shard with
# skip(n) also resumes faster (60,000 rows of 1 kB a file: 0.04 s against 0.31 s).
class HubStream:
    """One split of a streamed data set, with the interface of `data_mix.sources.tables.TableSplit`.

    The data set is opened when a row is first read. Train has `config.stream` rows, val `val_fraction` times as many.
    Without a val split in the data set, its first rows are val and the next are train. A file that fails is retried and
    then skipped, unless other files cannot be read either. Its rows before the failure are used; its other rows have no
    number, unless an earlier process read them.
    """

    def __init__(self, config: SourceConfig, *, pick: Callable[[pa.Schema], Iterable[str]], split: Split) -> None:
        """`pick` checks the schema when the data set is opened. UserError if val would be empty."""
        self.path, self.where, self.split, self._pick = config.path, config.where, split, pick
        self.bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        self._num_val = math.ceil(config.stream * config.val_fraction)
        self._num_rows = config.stream if split == "train" else self._num_val
        if not self._num_rows:
            raise UserError(f"{self.where}: no samples are left for the val split; raise val_fraction")
        self._starts = [0]  # the first row of each file that was read to its end and of the next, or the set's end
        self._rows: Iterator[tuple[int, dict[str, Any] | None]] = iter(())
        self._current: tuple[int, dict[str, Any] | None] = (-1, None)

    def __len__(self) -> int:
        return self._num_rows

    def key(self, index: int) -> str:
        """The name of a sample: its split and row."""
        return f"{self.path}/{self.files.label}#{self.files.first + index}"

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell; BadSample if the set ends before it (PastTheEnd) or its file is unreadable."""
        return self._record(self.files.first + index).get(column)

    @property
    def schema(self) -> pa.Schema:
        """From the description of the data set or its first rows."""
        return self.files.schema

    @property
    def read_file(self) -> Callable[[str], bytes] | None:
        """Reads an image that is a file of its own in the data set; None for other data sets."""
        return self._read_file if self.files.has_files else None

    def _read_file(self, path: str) -> bytes:
        import fsspec

        def read() -> bytes:
            with fsspec.open(path, "rb") as file:
                return file.read(MAX_FILE_BYTES + 1)

        try:
            data = retry(read, where=self.where, is_worth_it=lambda error, _: not isinstance(error, FileNotFoundError))
        except FileNotFoundError:
            raise BadSample("no image", detail=path) from None
        except Exception as error:  # of the hub client, requests or the operating system
            raise UserError(f"{self.where}: cannot read {path}: {one_line(error)}; {HOW_TO_RESUME}") from None
        if len(data) > MAX_FILE_BYTES:
            raise BadSample("too large", detail=path)
        return data

    def state(self) -> dict[str, Any]:
        """What is known of the files, as plain JSON: the rows at which they begin, and the unreadable ones."""
        reasons = {str(file): reason for file, reason in self.bad_files.reasons.items()}
        return {"files": self.files.digest, "starts": self._starts, "bad_files": reasons}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Number the rows as in `state`; False if it is of other files, as after a commit to the data set."""
        if state["files"] != self.files.digest:
            return False
        self._starts = list(state["starts"])
        self.bad_files.reasons |= {Path(file): reason for file, reason in state["bad_files"].items()}
        return True

    def _record(self, row: int) -> dict[str, Any]:
        current, record = self._current
        if row < self._end and (not 0 <= current <= row or self._file_of(row) != self._file_of(current)):
            self._rows, current = self._read(row), -1
        self._current = (-1, None)  # after an error, the next call starts a new reader
        while current < row:
            if row >= self._end or (numbered := next(self._rows, None)) is None:
                raise PastTheEnd("past the end", detail=f"{self.path} has {self._end} rows")
            current, record = numbered
        self._current = (current, record)
        if record is None:
            raise BadSample(UNREADABLE, detail=f"row {row} of {self.path}")
        return record

    @property
    def _end(self) -> float:
        return self._starts[-1] if len(self._starts) > len(self.files.names) else math.inf

    def _file_of(self, row: int) -> int:
        """The file that holds `row`, or the last one whose first row is known and before it."""
        return min(bisect.bisect_right(self._starts, row), len(self.files.names)) - 1

    def _read(self, row: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """The rows from `row` on with their numbers; None for a row that its file gave earlier and no longer gives."""
        for file in range(self._file_of(row), len(self.files.names)):
            number = start = self._starts[file]
            end = self._starts[file + 1] if file + 1 < len(self._starts) else None
            for record in itertools.islice(self._records(file), None if end is None else end - start):
                if number >= row:
                    yield number, record
                number += 1
            if end is not None:
                yield from ((missing, None) for missing in range(max(number, row), end))
            else:
                self._starts.append(number)
                num_missing = self.files.first + self._num_rows - number
                if num_missing > 0 and number == self._end:
                    logger.warning("%s: ends after %d rows, %d fewer than stream=", self.where, number, num_missing)

    def _records(self, file: int) -> Iterator[dict[str, Any]]:
        """The rows of a file, until its end or the first that cannot be read."""
        name, num_read = self.files.names[file], 0
        path, known = Path(name), self.bad_files.reasons
        records: Iterator[dict[str, Any]] | None = None

        def read_next() -> dict[str, Any] | None:
            nonlocal records
            reader, records = records or itertools.islice(self.files.rows(file), num_read, None), None
            record = next(reader, None)
            records = reader  # not after an error, which ends a reader
            return record

        while True:
            try:
                record = retry(read_next, where=self.where, is_worth_it=lambda *_: path not in known)
            except Exception as error:  # of the client, the builder or pyarrow: caused by the network or by the file
                if path in known:
                    return
                if not self._can_read_another(file):
                    reason = f"cannot read {name} at its row {num_read}: {one_line(error)}"
                    raise UserError(f"{self.where}: {reason}; {HOW_TO_RESUME}") from None
                try:
                    record = read_next()  # the network may have recovered after the last retry
                except Exception as last_error:
                    self.bad_files.add(path, f"{name} from its row {num_read} on: {one_line(last_error)}")
                    return
            if record is None:
                return
            yield record
            num_read += 1

    def _can_read_another(self, file: int) -> bool:
        """Whether another file can be read, so that `file` is the cause of an error and not the network."""
        for other in (file + 1, file - 1, 0, file + 2):
            with contextlib.suppress(Exception):  # as in _records
                if other != file and 0 <= other < len(self.files.names):
                    next(iter(self.files.rows(other)), None)
                    return True
        return False

    @functools.cached_property
    def files(self) -> HubFiles:
        """The files of the split, found when they are first needed; UserError if the data set cannot be opened."""
        import datasets

        name, revision, config = hub_place(self.path)
        with hub_errors(self.where):
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            if builder.name == "parquet":
                builder.config.batch_size = ROWS_AT_ONCE
            splits = builder.as_streaming_dataset()
            labels, by_hash = split_labels(list(splits), split=self.split, where=self.where)
            parts = [splits[label] for label in sorted(labels)]
            # A part without features has no image column that `datasets` would decode.
            parts = [part if part.features is None else part.decode(False) for part in parts]
            features, rows = parts[0].features, itertools.islice(parts[0], SCHEMA_ROWS)
            schema = features.arrow_schema if features is not None else pa.Table.from_pylist(list(rows)).schema
        self._pick(schema)
        label, data_files = "+".join(sorted(labels)), builder.config.data_files or {}
        names = [str(file) for part in sorted(labels) for file in data_files.get(part, [])]  # with the hub's commit
        sizes = [Path(name).stat().st_size if Path(name).exists() else 0 for name in names]
        digest = short_hash(label, config, names, sizes)
        if len(names) != (num_files := sum(part.num_shards for part in parts)):
            names = [f"{self.path}/{label}/{number}" for number in range(num_files)]
        first = self._num_val if by_hash and self.split == "train" else 0
        return HubFiles(label, parts, names, digest, schema, first, has_files=builder.name == IMAGE_FOLDER)


def open_rows(
    config: SourceConfig, *, kind: str, pick: Callable[[pa.Schema], Iterable[str]], split: Split
) -> TableSplit | HubStream:
    """The rows of a source of kind parquet or hub; `pick` names the columns of a schema to read, or refuses it."""
    if kind == "parquet":
        return open_parquet(config, pick=pick, split=split)
    return (HubStream if config.stream else open_hub)(config, pick=pick, split=split)


def hub_stream(source: object) -> HubStream | None:
    """The stream that a source of texts or images reads; None for a source that can be read in any order."""
    rows = getattr(source, "rows", None)
    return rows if isinstance(rows, HubStream) else None
