"""Text sources: documents by index, from the embedded prose, files of your own, or the hub."""

import contextlib
import functools
import io
import json
import logging
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from data_mix.demo.python_docs import packed, python_documents
from data_mix.order import each_index
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import SetAside
from data_mix.sources.file_index import Listing, open_index
from data_mix.sources.hub_streaming import StreamedPart, check_stream
from data_mix.sources.presets import TEXT_PRESETS, apply_preset
from data_mix.sources.splits import check_val_fraction, choose_rows
from data_mix.sources.tables import (
    TablePart,
    find_files,
    looks_like_hub,
    open_hub,
    open_parquet,
    parquet_schema,
    short_names,
)
from um3.core.errors import UserError

logger = logging.getLogger(__name__)

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz")
PLACES = pa.schema({"file": pa.int32(), "offset": pa.int64()})
PASSAGE_CHARS = 4000  # a plain text file becomes documents of about this length, cut between paragraphs

TextKind = Literal["auto", "python_docs", "txt", "jsonl", "parquet", "hub"]


@dataclass
class TextSourceConfig:
    """One text source.

    path: a .txt file or folder of them, .jsonl (also .zst, .gz) or .parquet file(s), or owner/name@revision:config of a
        hub set; empty for python_docs. `auto` tells the kind from it.
    preset: a data set whose fields are known (`data_mix.sources.presets`): dclm-baseline.
    field: the JSON field or column that holds the text.
    weight: its share of the text samples, relative to the other sources.
    val_fraction: kept for val where the data does not say itself what is train and what val.
    stream: of a hub set, read the first so many documents for train as they come (`data_mix.sources.hub_streaming`); 0 downloads it
        whole.
    """

    name: str = "python_docs"
    kind: TextKind = "auto"
    path: str = ""
    preset: str = ""
    field: str = "text"
    weight: float = 1.0
    val_fraction: float = 0.02
    stream: int = 0


@runtime_checkable
class TextSource(Protocol):
    """A map from index to document, an empty string where the data has a blank; BadSample where a file is set aside."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_text_source(config: TextSourceConfig, *, split: Split) -> TextSource:
    """Open `config`'s documents of one split; UserError for a missing path, a missing field or broken data."""
    check_val_fraction(config.val_fraction, name=config.name)
    config = apply_preset(config, presets=TEXT_PRESETS)
    kind = text_kind(config)
    check_stream(config.stream, kind=kind, name=config.name)
    if kind == "python_docs":
        documents = python_documents()
        texts = [document.text for document in documents]
        return _chosen(config, texts, key_of=lambda row: documents[row].key, split=split)
    if kind == "txt":
        keys, texts = _read_passages(config)
        return _chosen(config, texts, key_of=keys.__getitem__, split=split)
    if kind == "jsonl":
        return JsonlDocuments(config, split=split)
    if kind == "parquet":
        schema = parquet_schema(config.path, source=config.name)
        _check_text_column(schema, config)
        columns = [config.field]
        part = open_parquet(
            config.path, source=config.name, columns=columns, split=split, val_fraction=config.val_fraction
        )
        return TableDocuments(config, part)
    if config.stream:
        check = functools.partial(_check_text_column, config=config)
        streamed = StreamedPart(
            config.path,
            source=config.name,
            split=split,
            num_train=config.stream,
            val_fraction=config.val_fraction,
            check=check,
        )
        return TableDocuments(config, streamed)
    part = open_hub(config.path, source=config.name, split=split, val_fraction=config.val_fraction)
    _check_text_column(part.table.schema, config)
    return TableDocuments(config, part)


def text_kind(config: TextSourceConfig) -> TextKind:
    """`config.kind`, or for `auto` what the path looks like."""
    path = config.path
    if config.kind == "auto" and path:
        kinds: dict[TextKind, str | tuple[str, ...]] = {"parquet": ".parquet", "jsonl": JSONL, "txt": ".txt"}
        for kind, suffix in kinds.items():
            if path.endswith(suffix) or (Path(path).is_dir() and _holds(Path(path), suffix)):
                return kind
        if looks_like_hub(path):
            return "hub"
        raise UserError(
            f"source '{config.name}': '{path}' is no .txt, .jsonl or .parquet (file, folder or glob) and no hub "
            "set (owner/name); check the path or set kind"
        )
    if config.kind == "auto" or config.kind == "python_docs":
        if path:
            raise UserError(f"source '{config.name}': kind=python_docs takes no path; drop '{path}' or the kind")
        return "python_docs"
    if not path:
        raise UserError(f"source '{config.name}': kind={config.kind} needs a path")
    return config.kind


def _holds(folder: Path, suffix: str | tuple[str, ...]) -> bool:
    return any(file.name.endswith(suffix) for file in folder.rglob("*"))


def readable_texts(source: TextSource, *, seed: int, name: str) -> Iterator[str]:
    """The documents of a source in the order of `each_index`, without blanks and what cannot be read."""
    for index in each_index(source, seed=seed, name=name):
        with contextlib.suppress(BadSample):
            if (text := source[index]).strip():
                yield text


class ListedDocuments:
    """Documents held in memory."""

    def __init__(self, name: str, texts: Sequence[str]) -> None:
        self.name = name
        self._texts = list(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


def _chosen(
    config: TextSourceConfig, texts: Sequence[str], *, key_of: Callable[[int], str], split: Split
) -> ListedDocuments:
    rows = choose_rows(
        num_rows=len(texts),
        labels=None,
        key_of=key_of,
        split=split,
        val_fraction=config.val_fraction,
        where=f"source '{config.name}' ({config.path or 'python_docs'})",
    )
    return ListedDocuments(config.name, [texts[row] for row in rows])


def _read_passages(config: TextSourceConfig) -> tuple[list[str], list[str]]:
    """Keys and texts of the passages of all .txt files."""
    keys: list[str] = []
    texts: list[str] = []
    files = find_files(config.path, suffix=".txt", source=config.name)
    for name, file in zip(short_names(files, config.path), files, strict=True):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"source '{config.name}': '{file}' is not UTF-8 ({error.reason}); convert it") from None
        paragraphs = (paragraph.strip() for block in re.split(r"\n\s*\n", text) for paragraph in _cut(block))
        for number, passage in enumerate(packed(filter(None, paragraphs), max_chars=PASSAGE_CHARS)):
            keys.append(f"{name}#{number}")
            texts.append(passage)
    return keys, texts


def _cut(block: str) -> Iterator[str]:
    """A paragraph in pieces of at most PASSAGE_CHARS, cut at white space if there is any."""
    while len(block) > PASSAGE_CHARS:
        cut = max(block.rfind("\n", 0, PASSAGE_CHARS), block.rfind(" ", 0, PASSAGE_CHARS))
        cut = cut if cut > 0 else PASSAGE_CHARS
        yield block[:cut]
        block = block[cut:]
    yield block


class JsonlDocuments:
    """One JSON object a line. Lines are found and checked once, and read again from disk when asked for.

    Of a compressed file all lines are unpacked at once and kept until another file is asked for: in order, as a stream
    of tokens is made, that unpacks every file once.
    """

    def __init__(self, config: TextSourceConfig, *, split: Split) -> None:
        self.name = config.name
        self._field = config.field
        self._files = find_files(config.path, suffix=JSONL, source=config.name)
        self.set_aside = SetAside(config.name)
        self._unpacked: tuple[int, dict[int, bytes]] = (-1, {})  # file, lines by byte offset
        names = short_names(self._files, config.path)
        table = open_index(
            self._files,
            kind=f"jsonl-{config.field}",
            schema=PLACES,
            listing=self._listing,
            set_aside=self.set_aside,
        )
        if len(self.set_aside.reasons) == len(self._files):
            raise UserError(f"source '{config.name}': {next(iter(self.set_aside.reasons.values()))}")
        places_N2 = np.column_stack([table.column(name).to_numpy() for name in PLACES.names])
        num_documents = len(places_N2)
        places_N2 = places_N2[places_N2[:, 1] >= 0]
        if num_blank := num_documents - len(places_N2):
            logger.warning("source '%s': %d blank documents left out", config.name, num_blank)
        rows = choose_rows(
            num_rows=len(places_N2),
            labels=None,
            key_of=lambda row: f"{names[places_N2[row, 0]]}#{places_N2[row, 1]}",
            split=split,
            val_fraction=config.val_fraction,
            where=f"source '{config.name}' ({config.path})",
        )
        self._places_N2 = places_N2[rows]

    def _listing(self, number: int, file: Path) -> Listing:
        """Byte offsets of the file's documents, -1 of a blank one."""
        offsets = array("q")
        for line_number, (offset, line) in enumerate(_lines(file), start=1):
            text = self._text(line, where=f"source '{self.name}': {file}:{line_number}")
            offsets.append(offset if text.strip() else -1)
        columns = [pa.array([number] * len(offsets), pa.int32()), pa.array(np.frombuffer(offsets, dtype=np.int64))]
        return Listing(pa.Table.from_arrays(columns, schema=PLACES), whole=True)

    def _line(self, number: int, offset: int) -> bytes:
        file = self._files[number]
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                lines.seek(offset)
                return lines.readline()
        if self._unpacked[0] != number:
            self._unpacked = (number, dict(_lines(file)))
        return self._unpacked[1][offset]

    def _text(self, line: bytes, *, where: str) -> str:
        if not line.strip():
            return ""
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        value = record.get(self._field) if isinstance(record, dict) else None
        if isinstance(value, str):
            return value
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no text in field '{self._field}' (has: {fields}); set field")

    def __len__(self) -> int:
        return len(self._places_N2)

    def __getitem__(self, index: int) -> str:
        number, offset = (int(place) for place in self._places_N2[index])
        file = self._files[number]
        return self._text(self.set_aside.read(file, lambda: self._line(number, offset)), where=str(file))


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, unpacked where its name says so, each with its byte offset."""
    offset = 0
    with pa.input_stream(str(file), compression="detect") as stream, io.BufferedReader(stream) as lines:
        for line in lines:
            yield offset, line
            offset += len(line)


class TableDocuments:
    """One column of a table; a null is an empty document."""

    def __init__(self, config: TextSourceConfig, part: TablePart | StreamedPart) -> None:
        self.name = config.name
        self._field = config.field
        self._part, self.set_aside = part, part.set_aside
        self.streamed = part if isinstance(part, StreamedPart) else None

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> str:
        return self._part.value(index, column=self._field) or ""


def _check_text_column(schema: pa.Schema, config: TextSourceConfig) -> None:
    where, column = f"source '{config.name}' ({config.path})", config.field
    if column not in schema.names:
        raise UserError(f"{where}: no column '{column}' (has: {', '.join(schema.names)}); set field")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{where}: column '{column}' holds {kind}, not text; set field to a text column")
