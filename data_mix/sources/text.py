"""Text sources: documents by index, from the built-in prose, from files, or from a Hugging Face data set."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data_mix.demo.python_docs import packed, python_documents
from data_mix.order import each_index
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles, DamagedFile
from data_mix.sources.config import TextSourceConfig
from data_mix.sources.file_index import FileIndex
from data_mix.sources.files import FILE_KINDS, file_keys, list_files, parse_record, read_lines, text_kind
from data_mix.sources.hub_streaming import HubStream, open_rows
from data_mix.sources.presets import TEXT_PRESETS, apply_preset
from data_mix.sources.tables import TableSplit, check_column, holds_text
from data_mix.splits import choose_samples
from um3.core.errors import UserError
from um3.core.text import valid_text

INDEX_SCHEMA = pa.schema({"offset": pa.int64()})  # byte offset of each document
PASSAGE_CHARS = 4000  # a plain text file is cut between paragraphs into documents of about this length


@runtime_checkable
class TextSource(Protocol):
    """A map from index to document; BadSample for a blank one and for one whose file cannot be read."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> str: ...


def open_text_source(config: TextSourceConfig, *, split: Split) -> TextSource:
    """Open the documents of one split; UserError for a missing path, a missing field or broken data."""
    source = _open(apply_preset(config, presets=TEXT_PRESETS), split=split)
    source.bad_files.report(len(source))
    return source


def _open(config: TextSourceConfig, *, split: Split) -> "ListDocuments | JsonlDocuments | TableDocuments":
    kind, bad_files = text_kind(config), BadFiles(config.name, skip=config.skip_bad_files)
    if kind == "jsonl":
        return JsonlDocuments(config, split=split)
    if kind in ("python_docs", "txt"):
        documents = list(_passages(config, bad_files) if kind == "txt" else python_documents())
        chosen = choose_samples(config, (key for key, _ in documents), num_samples=len(documents), split=split)
        return ListDocuments(config.name, [documents[number][1] for number in chosen], bad_files=bad_files)
    options: dict[str, Any] = {"column": config.field, "fits": holds_text, "expected": "text", "setting": "field"}
    rows = open_rows(config, kind=kind, pick=functools.partial(check_column, config, **options), split=split)
    if isinstance(rows, TableSplit):
        rows.skip_nulls(config.field)
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


def _passages(config: TextSourceConfig, bad_files: BadFiles) -> Iterator[tuple[str, str]]:
    """Key and text of each passage of all .txt files; UserError if none can be read."""
    files = list_files(config.path, suffixes=FILE_KINDS["txt"], source=config.name)
    for name, file in zip(file_keys(files, config.path), files, strict=True):
        with contextlib.suppress(BadSample):
            text = bad_files.read(file, functools.partial(_read_text, file))
            paragraphs = (paragraph.strip() for block in re.split(r"\n\s*\n", text) for paragraph in _cut(block))
            for number, passage in enumerate(packed(filter(None, paragraphs), max_chars=PASSAGE_CHARS)):
                yield f"{name}#{number}", passage
    if len(bad_files.reasons) == len(files):
        raise UserError(f"source '{config.name}': {bad_files.reasons[files[0]]}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"'{file}' is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _cut(block: str) -> Iterator[str]:
    """A paragraph in pieces of at most PASSAGE_CHARS, cut at white space if there is any."""
    start = 0
    while len(block) - start > PASSAGE_CHARS:
        end = start + PASSAGE_CHARS
        cut = max(block.rfind(space, start, end) for space in "\n ")
        cut = cut if cut > start else end
        yield block[start:cut]
        start = cut
    yield block[start:]


# Not `datasets`' JSON builder: it copies all columns to disk (112 MiB for 114 MiB of lines, opened in 1.7 s; this index
# takes 0.5 MiB and 1.3 s), fails if a field that is not read changes its type, and its errors name no line.
class JsonlDocuments:
    """One JSON object a line. Lines are found and checked once, and read from disk when needed.

    A compressed file is unpacked whole and kept until another is read, so reading in order unpacks every file once.
    """

    def __init__(self, config: TextSourceConfig, *, split: Split) -> None:
        self.name, self._field = config.name, config.field
        self._unpacked: tuple[Path | None, dict[int, bytes]] = (None, {})  # a file and its lines by byte offset
        self._index = FileIndex(
            config, kind="jsonl", variant=config.field, split=split, schema=INDEX_SCHEMA, list_file=self._list_lines
        )
        self.bad_files = self._index.bad_files

    def _list_lines(self, file: Path, bad_files: BadFiles) -> pa.Table:
        offsets = []
        for number, (offset, line) in enumerate(read_lines(file), start=1):
            try:
                if self._text(line).strip():
                    offsets.append(offset)
                else:
                    bad_files.count("blank", f"{file}:{number}")
            except ValueError as error:
                bad_files.skip_record(f"no text in field '{self._field}'", f"{file}:{number} ({error})")
        return pa.table({"offset": offsets}, schema=INDEX_SCHEMA)

    def _line(self, file: Path, offset: int) -> bytes:
        if file.suffix.lower() == ".jsonl":
            with file.open("rb") as lines:
                lines.seek(offset)
                return lines.readline()
        if self._unpacked[0] != file:
            self._unpacked = (file, dict(read_lines(file)))
        return self._unpacked[1][offset]

    def _text(self, line: bytes) -> str:
        """The text of a line, empty for a blank one; ValueError if it holds none."""
        record = parse_record(line) if line.strip() else {self._field: ""}
        if not isinstance(text := record.get(self._field), str):
            raise ValueError(f"has: {', '.join(record)}")
        return valid_text(text)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> str:
        entry = self._index.entry(index)
        file = self._index.files[entry["file"]]
        return self._text(self.bad_files.read(file, lambda: self._line(file, entry["offset"])))


class TableDocuments:
    """The documents in one column of a table; BadSample for a null and for a blank one."""

    def __init__(self, config: TextSourceConfig, rows: TableSplit | HubStream) -> None:
        self.name, self._field = config.name, config.field
        self._rows, self.bad_files = rows, rows.bad_files
        self.stream = rows if isinstance(rows, HubStream) else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        text: str | None = self._rows.value(index, column=self._field)
        if text is None or not text.strip():
            raise BadSample("blank", detail=self._rows.key(index))
        return text
