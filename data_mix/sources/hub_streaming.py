"""Sets of the Hugging Face hub read as they come, file after file, without a download of the whole.

A streamed set is read in its own order: what asks for its rows one after the other reads each of its bytes once. Who
stops keeps `StreamedPart.state()` beside what it has made, and whoever goes on from it starts with the file that the
other stopped in.
"""

import bisect
import functools
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources import bad_files as set_aside
from data_mix.sources.bad_files import SET_ASIDE, SetAside
from data_mix.sources.splits import part_labels
from data_mix.sources.tables import FILES, hub_place, one_line
from um3.core.errors import UserError
from um3.core.images import MAX_FILE_BYTES

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256  # of a parquet file, whose row groups may be as large as the file
FIRST_ROWS = 100  # tell the columns of a set that does not
GO_ON = "what is finished is kept, run again to go on from it"


class PastTheEnd(BadSample):
    """The set has fewer rows than `stream` asks for."""


def check_stream(stream: int, *, kind: str, name: str) -> None:
    """UserError unless `stream` is 0, or the number of rows to take of a hub set."""
    if stream < 0 or (stream and kind != "hub"):
        raise UserError(
            f"source '{name}': stream={stream} with kind={kind}; it is the number of samples to take of a hub set as "
            "they come, 0 for data on this disk"
        )


class StreamedFiles(NamedTuple):
    """The files of a part of a set, one after the other.

    digest: names them, those of the hub by their commit. first: the row with which the split begins.
    """

    label: str
    parts: Sequence["IterableDataset"]
    names: Sequence[str]
    digest: str
    schema: pa.Schema
    first: int
    has_files: bool

    def rows(self, number: int) -> "IterableDataset":
        """Those of one file; made when asked for, since each of them holds a list of all files."""
        for part in self.parts:
            if number < part.num_shards:
                return part.shard(part.num_shards, number)
            number -= part.num_shards
        raise IndexError(f"file {number} is behind the last of {len(self.names)}")


class StreamedPart:
    """One split of a hub set, to be read in order; otherwise what `data_mix.sources.tables.TablePart` is. It is opened when the
    first row, or something about it, is asked for.

    Train has `num_train` rows and val `val_fraction` times as many: of a part of its own where the set has one, else
    they come before those of train. A row past the end of the set is a BadSample.

    A file that fails is tried again and then set aside, unless others cannot be read either. What it gave before is
    kept; its other rows have no number.
    """

    def __init__(
        self,
        path: str,
        *,
        source: str,
        split: Split,
        num_train: int,
        val_fraction: float,
        check: Callable[[pa.Schema], object] | None = None,
    ) -> None:
        """`check` is called with the schema when the set is opened.

        Raises:
            UserError: val_fraction keeps nothing for val.
        """
        self.path, self.split, self.check = path, split, check
        self.where = f"source '{source}' (hub set {path})"
        self.set_aside = SetAside(source)
        self._num_val = math.ceil(num_train * val_fraction)
        self._length = num_train if split == "train" else self._num_val
        if not self._length:
            raise UserError(f"{self.where}: nothing for the val split; raise val_fraction")
        self._starts = [0]  # first row of every file up to the first that was not read to its end; then the set's end
        self._rows: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._current: tuple[int, dict[str, Any]] = (-1, {})
        self._gap = range(0)  # rows that a file had once and does not give any more

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """A name for sample `index`: part and row in it."""
        return f"{self.path}/{self._files.label}#{self._files.first + index}"

    def value(self, index: int, *, column: str) -> Any:
        """The Python value of one cell.

        Raises:
            BadSample: the set ends before it (PastTheEnd), or a file that was set aside does not give it any more.
            UserError: the set cannot be opened or, after a while of trying, read.
        """
        return self._record(self._files.first + index).get(column)

    @property
    def schema(self) -> pa.Schema:
        """The columns, from the set's description or its first rows."""
        return self._files.schema

    @property
    def digest(self) -> str:
        """Names the files, those of the hub by their commit."""
        return self._files.digest

    @property
    def has_files(self) -> bool:
        """Whether its images are files of their own beside the table."""
        return self._files.has_files

    def file(self, path: str) -> bytes:
        """The file of an image, where `has_files`.

        Raises:
            BadSample: it is not there, or too large for a picture.
            UserError: it cannot be had after a while of trying.
        """
        import fsspec

        for wait in (*set_aside.RETRY_WAITS_S, None):
            try:
                with fsspec.open(path, "rb") as file:
                    data = file.read(MAX_FILE_BYTES + 1)
                break
            except FileNotFoundError:
                raise BadSample("no image", detail=path) from None
            except Exception as error:  # as in _records
                if wait is None:
                    raise UserError(f"{self.where}: cannot read {path}: {one_line(error)}; {GO_ON}") from None
                time.sleep(wait)
        if len(data) > MAX_FILE_BYTES:
            raise BadSample("too large", detail=path)
        return data

    def state(self) -> dict[str, Any]:
        """What is known of the files, as plain JSON: where they begin, which are set aside."""
        reasons = {str(file): reason for file, reason in self.set_aside.reasons.items()}
        return {"files": self.digest, "starts": self._starts, "set_aside": reasons}

    def go_on(self, state: Mapping[str, Any]) -> bool:
        """Number the rows as in `state`; False where it is of other files, as after a commit to the set."""
        if state["files"] != self.digest:
            return False
        self._starts = list(state["starts"])
        self.set_aside.reasons |= {Path(file): reason for file, reason in state["set_aside"].items()}
        return True

    # --- rows

    def _record(self, row: int) -> dict[str, Any]:
        if row in self._gap:
            raise BadSample(SET_ASIDE, detail=f"row {row} of {self.path}")
        current, _ = self._current
        if current < 0 or row < current or self._file_of(row) != self._file_of(current):
            self._rows, self._current = self._read(row), (-1, {})
        while self._current[0] < row:
            try:
                found = next(self._rows, None) if row < self._end else None
            except UserError:
                self._current = (-1, {})  # whoever asks again begins again
                raise
            if found is None:
                raise PastTheEnd("past the end", detail=f"{self.path} has {self._end} rows")
            self._current = found
        number, record = self._current
        if number > row:
            self._gap = range(row, number)
            raise BadSample(SET_ASIDE, detail=f"row {row} of {self.path}")
        return record

    @property
    def _end(self) -> float:
        return self._starts[-1] if len(self._starts) > len(self._files.names) else math.inf

    def _file_of(self, row: int) -> int:
        """The file that holds `row`, or the last that is known to begin before it."""
        return min(bisect.bisect_right(self._starts, row), len(self._files.names)) - 1

    def _read(self, row: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows from `row` on, each with its number."""
        for number in range(self._file_of(row), len(self._files.names)):
            start = place = self._starts[number]
            known = self._starts[number + 1] - start if number + 1 < len(self._starts) else None
            for record in itertools.islice(self._records(number), known):
                if place >= row:
                    yield place, record
                place += 1
            if known is None:
                self._learn(end=place)

    def _learn(self, *, end: int) -> None:
        """Note where the last file that was read ends."""
        self._starts.append(end)
        if (missing := self._files.first + self._length - end) > 0 and end == self._end:
            logger.warning("%s: ends after %d rows, %d fewer than stream asks for", self.where, end, missing)

    def _records(self, number: int) -> Iterator[dict[str, Any]]:
        """The rows of a file, as far as they can be read."""
        name, given, failures = self._files.names[number], 0, 0
        waits = set_aside.RETRY_WAITS_S
        while True:
            try:
                for record in itertools.islice(self._files.rows(number), given, None):
                    yield record
                    given, failures = given + 1, 0
                return
            except Exception as error:  # the client's, the builder's, pyarrow's: for the network or for the file
                reason = one_line(error)
                if Path(name) in self.set_aside.reasons:
                    return
                if failures < len(waits):
                    logger.info("%s: trying again in %g s: %s", self.where, waits[failures], reason)
                    time.sleep(waits[failures])
                elif not self._another_can_be_read(number):
                    raise UserError(f"{self.where}: cannot read {name} at its row {given}: {reason}; {GO_ON}") from None
                elif failures > len(waits):  # the others could be read already before the last try
                    self.set_aside.reasons[Path(name)] = reason
                    logger.warning("%s: set aside from its row %d on: %s: %s", self.where, given, name, reason)
                    return
                failures += 1

    def _another_can_be_read(self, number: int) -> bool:
        """Whether the trouble is the file's, not the network's."""
        for other in (number + 1, number - 1, 0, number + 2):
            if other != number and 0 <= other < len(self._files.names):
                try:
                    next(iter(self._files.rows(other)), None)
                except Exception:  # as in _records
                    continue
                return True
        return False

    # --- the set

    @functools.cached_property
    def _files(self) -> StreamedFiles:
        import datasets

        name, revision, config = hub_place(self.path)
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            if builder.name == "parquet":
                builder.config.batch_size = ROWS_AT_ONCE
            sets = builder.as_streaming_dataset()
            labels, divided = part_labels(list(sets), split=self.split, where=self.where)
            parts = [sets[label] for label in sorted(labels)]
            # What does not know its columns holds no images to be decoded.
            parts = [part if part.features is None else part.decode(False) for part in parts]
            schema = _schema(parts[0])
        except UserError:
            raise
        except Exception as error:
            # The hub client raises its own, the network's, pyarrow's and the builder's errors for the user's mistakes.
            raise UserError(f"{self.where}: cannot be opened: {one_line(error)}") from None
        if self.check is not None:
            self.check(schema)
        label, listed = "+".join(sorted(labels)), builder.config.data_files or {}
        names = [str(file) for part in sorted(labels) for file in listed.get(part, [])]
        digest = _digest(label, config, names)
        if len(names) != (num_files := sum(part.num_shards for part in parts)):
            names = [f"{self.path}/{label}/{number}" for number in range(num_files)]
        first = self._num_val if divided and self.split == "train" else 0
        return StreamedFiles(label, parts, names, digest, schema, first, has_files=builder.name == FILES)


def streamed_part(source: object) -> StreamedPart | None:
    """What a source of texts or images streams from; None for one that can be read in any order."""
    return getattr(source, "streamed", None)


def _schema(part: "IterableDataset") -> pa.Schema:
    if part.features is not None:
        return part.features.arrow_schema
    return pa.Table.from_pylist(list(itertools.islice(part, FIRST_ROWS))).schema


def _digest(label: str, config: str | None, names: Sequence[str]) -> str:
    """Names a part by its files: those of the hub by their commit, those on this disk by their size and time."""
    states = [Path(name).stat() if Path(name).exists() else None for name in names]
    known = [(name, state and (state.st_size, state.st_mtime_ns)) for name, state in zip(names, states, strict=True)]
    return hashlib.sha256(repr((label, config, known)).encode()).hexdigest()[:24]
