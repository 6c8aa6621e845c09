"""Text sources: documents by index, from the built-in prose, from files, or from a Hugging Face data set."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.demo.python_docs import packed, python_documents
from data_mix.order import each_index
from data_mix.samples import BadSample, Split, usable
from data_mix.sources.bad_files import BadFiles, DamagedFile
from data_mix.sources.config import TextSourceConfig
from data_mix.sources.file_index import FileIndex
from data_mix.sources.files import BLANK, FILE_KINDS, file_keys, list_files, read_lines, read_records, source_kind
from data_mix.sources.hub_streaming import HubStream, open_rows
from data_mix.sources.presets import apply_preset
from data_mix.sources.tables import TableSplit, check_column, holds_text
from data_mix.splits import choose_samples
from um3.core.files import parse_json
from um3.core.text import valid_text

INDEX_SCHEMA = pa.schema({"offset": pa.int64()})  # byte offset of each document
PASSAGE_CHARS = 4000  # a plain text file is cut between paragraphs into documents of about this length


class TextSource:
    """A map from index to document, here of documents in memory; the others override `__getitem__`, which raises
    BadSample for a blank document and for one whose file cannot be read."""

    def __init__(self, name: str, rows: Any, bad_files: BadFiles | None = None) -> None:
        self.name, self.rows, self.bad_files = name, rows, bad_files or BadFiles(name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return str(self.rows[index])


def open_text_source(config: TextSourceConfig, *, split: Split) -> TextSource:
    """Open the documents of one split; UserError for a missing path, a missing field or broken data."""
    config = apply_preset(config)
    kind, bad_files = source_kind(config), BadFiles(config.name, skip=config.skip_bad_files)
    if kind == "jsonl":
        source: TextSource = JsonlDocuments(config, split=split)
    elif kind in ("python_docs", "txt"):
        documents = list(_passages(config, bad_files) if kind == "txt" else python_documents())
        chosen = choose_samples(config, (key for key, _ in documents), num_samples=len(documents), split=split)
        source = TextSource(config.name, [documents[number][1] for number in chosen], bad_files)
    else:
        options: dict[str, Any] = {"column": config.field, "fits": holds_text, "expected": "text", "setting": "field"}
        rows = open_rows(config, kind=kind, pick=functools.partial(check_column, config, **options), split=split)
        if isinstance(rows, TableSplit):
            rows.skip_nulls(config.field)
        source = TableDocuments(config.name, rows, rows.bad_files, column=config.field)
    source.bad_files.report(len(source))
    return source


def readable_texts(source: TextSource, *, seed: int, name: str) -> Iterator[str]:
    """The documents of a source in the order of `each_index`, without blank and unreadable ones."""
    return filter(str.strip, usable(source.__getitem__, each_index(source, seed=seed, name=name)))


class TableDocuments(TextSource):
    """The documents in one column of a table; BadSample for a null and for a blank one."""

    def __init__(self, name: str, rows: TableSplit | HubStream, bad_files: BadFiles, *, column: str) -> None:
        super().__init__(name, rows, bad_files)
        self._column = column

    def __getitem__(self, index: int) -> str:
        text: str | None = self.rows.value(index, column=self._column)
        if text is None or not text.strip():
            raise BadSample(BLANK, detail=self.rows.key(index))
        return text


# Not `datasets`' JSON builder: it copies all columns to disk (112 MiB for 114 MiB of lines, opened in 1.7 s; this index
# takes 0.5 MiB and 1.3 s), fails if a field that is not read changes its type, and its errors name no line.
class JsonlDocuments(TextSource):
    """One JSON object a line. Lines are found and checked once, and read from disk when needed.

    A compressed file is unpacked whole and kept until another is read, so reading in order unpacks every file once.
    """

    def __init__(self, config: TextSourceConfig, *, split: Split) -> None:
        self._field = config.field
        self._unpack = functools.lru_cache(maxsize=1)(lambda file: dict(read_lines(file)))  # lines by byte offset
        rows = FileIndex(config, kind="jsonl", variant=config.field, split=split, list_file=self._list_lines)
        super().__init__(config.name, rows, rows.bad_files)

    def _list_lines(self, file: Path, bad_files: BadFiles) -> pa.RecordBatch:
        reason = f"no text in field '{self._field}'"
        offsets = [offset for offset, _ in read_records(file, self._text, reason=reason, bad_files=bad_files)]
        return pa.record_batch({"offset": offsets}, schema=INDEX_SCHEMA)

    def _line(self, file: Path, offset: int) -> bytes:
        if str(file).lower().endswith(".jsonl"):
            with open(file, "rb") as lines:
                lines.seek(offset)
                return lines.readline()
        return self._unpack(file)[offset]

    def _text(self, record: dict[str, Any]) -> str:
        """The text of a record; BadSample for a blank one, ValueError if it has none."""
        if not isinstance(text := record.get(self._field), str):
            raise ValueError(f"has: {', '.join(record)}")
        if not text.strip():
            raise BadSample(BLANK)
        return valid_text(text)

    def __getitem__(self, index: int) -> str:
        file, offset = self.rows.entry(index, "offset")
        line = self.bad_files.read(file, lambda: self._line(file, offset))
        return self._text(parse_json(line, where=file, kind=dict))


def _passages(config: TextSourceConfig, bad_files: BadFiles) -> Iterator[tuple[str, str]]:
    """Key and text of each passage of all .txt files; UserError if none can be read."""
    files = list_files(config.path, suffixes=FILE_KINDS["txt"], source=config.name)
    names = file_keys(files, config.path)
    for file, text in bad_files.read_all(files, _read_text):
        paragraphs = (paragraph.strip() for block in re.split(r"\n\s*\n", text) for paragraph in _cut(block))
        for number, passage in enumerate(packed(filter(None, paragraphs), max_chars=PASSAGE_CHARS)):
            yield f"{names[file]}#{number}", passage


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
