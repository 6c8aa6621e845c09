"""Text sources: documents by index, from the built-in prose, from files, or from a Hugging Face data set."""

import contextlib
import functools
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa

from data_mix.demo.python_docs import packed, python_documents
from data_mix.order import each_index
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import TextSourceConfig
from data_mix.sources.file_index import FileIndex, Listing
from data_mix.sources.files import JSONL, TEXT_KINDS, file_keys, list_files, text_kind
from data_mix.sources.hub_streaming import HubStream
from data_mix.sources.presets import TEXT_PRESETS, apply_preset
from data_mix.sources.tables import TableSplit, check_column, holds_text, open_hub, open_parquet, parquet_schema
from data_mix.splits import choose_samples
from um3.core.errors import UserError

__all__ = ["TextSource", "TextSourceConfig", "open_text_source", "readable_texts"]

logger = logging.getLogger(__name__)

INDEX_SCHEMA = pa.schema({"offset": pa.int64()})  # byte offset of each document, null for a blank one
PASSAGE_CHARS = 4000  # a plain text file is cut between paragraphs into documents of about this length


@runtime_checkable
class TextSource(Protocol):
    """A map from index to document: an empty string for a blank one, BadSample if its file cannot be read."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_text_source(config: TextSourceConfig, *, split: Split) -> TextSource:
    """Open the documents of one split; UserError for a missing path, a missing field or broken data."""
    config = apply_preset(config, presets=TEXT_PRESETS)
    kind = text_kind(config)
    if kind == "python_docs":
        documents = python_documents()
        return _split_documents(config, [(document.key, document.text) for document in documents], split=split)
    if kind == "txt":
        bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        return _split_documents(config, list(_passages(config, bad_files)), split=split, bad_files=bad_files)
    if kind == "jsonl":
        return JsonlDocuments(config, split=split)
    check = functools.partial(
        check_column, config, column=config.field, fits=holds_text, expected="text", setting="field"
    )
    if kind == "parquet":
        check(parquet_schema(config))
        return TableDocuments(config, open_parquet(config, columns=[config.field], split=split))
    if config.stream:
        return TableDocuments(config, HubStream(config, split=split, check=check))
    rows = open_hub(config, split=split)
    check(rows.schema)
    return TableDocuments(config, rows)


def readable_texts(source: TextSource, *, seed: int, name: str) -> Iterator[str]:
    """The documents of a source in the order of `each_index`, without blank and unreadable ones."""
    for index in each_index(source, seed=seed, name=name):
        with contextlib.suppress(BadSample):
            if (text := source[index]).strip():
                yield text


class ListDocuments:
    """Documents in memory."""

    def __init__(self, name: str, texts: Sequence[str], *, bad_files: BadFiles | None = None) -> None:
        self.name, self.bad_files = name, bad_files or BadFiles(name)
        self._texts = list(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


def _split_documents(
    config: TextSourceConfig, documents: Sequence[tuple[str, str]], *, split: Split, bad_files: BadFiles | None = None
) -> ListDocuments:
    """The documents (key, text) of one split."""
    keys = (key for key, _ in documents)
    chosen = choose_samples(config, keys, num_samples=len(documents), split=split)
    return ListDocuments(config.name, [documents[number][1] for number in chosen], bad_files=bad_files)


def _passages(config: TextSourceConfig, bad_files: BadFiles) -> Iterator[tuple[str, str]]:
    """Key and text of each passage of all .txt files."""
    files = list_files(config.path, suffixes=TEXT_KINDS["txt"], source=config.name)
    for name, file in zip(file_keys(files, config.path), files, strict=True):
        try:
            text = bad_files.read(file, functools.partial(file.read_text, encoding="utf-8-sig"))
        except BadSample:
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"source '{config.name}': '{file}' is not UTF-8 ({error.reason}); convert it") from None
        paragraphs = (paragraph.strip() for block in re.split(r"\n\s*\n", text) for paragraph in _cut(block))
        for number, passage in enumerate(packed(filter(None, paragraphs), max_chars=PASSAGE_CHARS)):
            yield f"{name}#{number}", passage


def _cut(block: str) -> Iterator[str]:
    """A paragraph in pieces of at most PASSAGE_CHARS, cut at white space if there is any."""
    while len(block) > PASSAGE_CHARS:
        cut = max(block.rfind("\n", 0, PASSAGE_CHARS), block.rfind(" ", 0, PASSAGE_CHARS))
        cut = cut if cut > 0 else PASSAGE_CHARS
        yield block[:cut]
        block = block[cut:]
    yield block


# Not `datasets`' JSON builder: it copies all columns to disk (112 MiB for 114 MiB of lines, opened in 1.7 s; this index
# takes 0.5 MiB and 1.3 s), fails if a field that is not read changes its type, and its errors name no line.
class JsonlDocuments:
    """One JSON object a line. Lines are found and checked once, and read from disk when needed.

    A compressed file is unpacked whole and kept until another is read, so reading in order unpacks every file once.
    """

    def __init__(self, config: TextSourceConfig, *, split: Split) -> None:
        self.name, self._field = config.name, config.field
        self.bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        self._unpacked: tuple[Path | None, dict[int, bytes]] = (None, {})  # a file and its lines by byte offset
        self._index = FileIndex(
            config,
            split=split,
            suffixes=JSONL,
            schema=INDEX_SCHEMA,
            kind=f"jsonl-{config.field}",
            list_file=self._list_lines,
            bad_files=self.bad_files,
        )

    def _list_lines(self, file: Path) -> Listing:
        offsets = []
        for number, (offset, line) in enumerate(_lines(file), start=1):
            text = self._text(line, where=f"source '{self.name}': {file}:{number}")
            offsets.append(offset if text.strip() else None)
        return Listing(pa.table({"offset": offsets}, schema=INDEX_SCHEMA), is_whole=True)

    def _line(self, file: Path, offset: int) -> bytes:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                lines.seek(offset)
                return lines.readline()
        if self._unpacked[0] != file:
            self._unpacked = (file, dict(_lines(file)))
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
        return len(self._index)

    def __getitem__(self, index: int) -> str:
        entry = self._index.entry(index)
        file = self._index.files[entry["file"]]
        return self._text(self.bad_files.read(file, lambda: self._line(file, entry["offset"])), where=str(file))


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its byte offset; a compressed file is unpacked."""
    offset = 0
    with pa.input_stream(str(file), compression="detect") as stream, io.BufferedReader(stream) as lines:
        for line in lines:
            yield offset, line
            offset += len(line)


class TableDocuments:
    """The documents in one column of a table; a null is an empty document."""

    def __init__(self, config: TextSourceConfig, rows: TableSplit | HubStream) -> None:
        self.name, self._field = config.name, config.field
        self._rows, self.bad_files = rows, rows.bad_files
        self.stream = rows if isinstance(rows, HubStream) else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return self._rows.value(index, column=self._field) or ""
