"""One reader for the files in which benchmarks publish prompts, reference captions and results.

.jsonl           one JSON object a line
.csv .tsv        a table; column names are read in lower case
.json            COCO's annotations, Karpathy's dataset_coco.json, {file name: captions}, or a list of objects
.parquet         a table
owner/name       a data set of the Hugging Face hub
a folder         .parquet files; images with a metadata.jsonl or with a .txt of the same name each; or .txt files
any other file   one text a line, in the field "text"

Which files of a folder count, how lines end, and what becomes of text that UTF-8 cannot hold: as for every reader of
training data (`um3.core.files.walk_files`, `um3.core.text`). Fields of a .tsv are read as they stand; those of a .csv
may be quoted.

`datasets` reads only the hub sets: for the other forms it requires equal fields on every line, stops at the first
damaged one without its number, and stores a second copy.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.files import parse_json, walk_files
from um3.core.images import SUFFIXES
from um3.core.text import text_lines, valid_text

METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("sentences_raw", "captions", "caption", "sentences", "answer", "text", "prompt")
BATCH = 64


class Record(NamedTuple):
    """One entry of a file: its values by name (None if the line is not a JSON object), its place, and its JSON line."""

    fields: dict[str, Any] | None
    place: str
    line: str = ""


def read_records(path: str | Path, *, split: str = "") -> Iterator[Record]:
    """Read the records of a file, a folder or a hub set in their order.

    `split` names the part of a hub set. In a folder of .parquet files it selects those with `split` in their name, if
    there are any. A record that has a field "split" is returned whatever its split.

    UserError if `path` is neither a file, a folder nor an accessible hub set; ValueError, TypeError, KeyError,
    AttributeError, csv.Error or OSError if the content has another form.
    """
    place = Path(path)
    if place.suffix == ".jsonl":
        yield from json_lines(place)
    elif place.is_dir() and (place / METADATA).is_file():
        yield from json_lines(place / METADATA)
    else:
        for number, row in enumerate(_rows(place, split=split), start=1):
            yield Record(_fields(row), f"{path}, record {number}")


def json_lines(path: Path) -> Iterator[Record]:
    """Read the lines of a .jsonl file; blank lines are ignored.

    Lines end with "\\n" only: `str.splitlines` would also cut at U+2028 inside a text.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            place = f"{path}:{number}"
            try:
                line = data.decode("utf-8-sig").rstrip("\r\n")
                fields = parse_json(line, where=place)
            except (UnicodeDecodeError, UserError):
                line, fields = "", None
            yield Record(_fields(fields), place, line)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; UserError names the file and the place."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path") from None


def image_files(folder: Path) -> dict[str, Path]:
    """Find all images below a folder (`walk_files`), by their names below it, sorted; UserError if there are none."""
    files = walk_files(folder, suffixes=SUFFIXES)
    if not files:
        raise UserError(f"{folder} contains no images ({' '.join(SUFFIXES)}); give a folder of images")
    return {file.relative_to(folder).as_posix(): file for file in files}


def captions_of(fields: Mapping[str, Any]) -> list[str]:
    """The captions of a record: a text, a list of texts, or Karpathy's sentences; KeyError without any."""
    content = fields[first_field(fields, CAPTION_FIELDS)]
    values = content if isinstance(content, list | tuple) else [content]
    texts = [value.get("raw") if isinstance(value, Mapping) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def image_id_of(fields: Mapping[str, Any]) -> str:
    """COCO's number of a record's image; empty without one."""
    return str(fields.get("cocoid", fields.get("image_id", "")))


def first_field(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of `names` that has a value; KeyError if none has."""
    for name in names:
        if fields.get(name) is not None:
            return name
    raise KeyError(f"none of {', '.join(names)}")


def _fields(row: Any) -> dict[str, Any] | None:
    """The fields of a row in valid text; None if it is no object, or nested too deeply."""
    try:
        return dict(_valid(row)) if isinstance(row, dict) else None
    except RecursionError:
        return None


def _valid(value: Any) -> Any:
    """A value of JSON's kind with valid text in all places."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    return {_valid(name): _valid(item) for name, item in value.items()} if isinstance(value, dict) else value


def _rows(path: Path, *, split: str) -> Iterator[Any]:
    tables = walk_files(path, suffixes=(".parquet",)) if path.is_dir() else [path] * (path.suffix == ".parquet")
    if tables:
        import pyarrow.dataset

        selected = [file for file in tables if split in file.stem.lower()] or tables
        for batch in pyarrow.dataset.dataset(selected).to_batches(batch_size=BATCH, use_threads=False):
            yield from batch.to_pylist()
    elif path.is_dir():
        yield from _folder_rows(path)
    elif not path.exists():
        yield from _hub_rows(str(path), split=split)
    elif path.suffix == ".json":
        yield from _json_rows(parse_json(path.read_bytes(), where=path))
    elif path.suffix in (".csv", ".tsv"):
        text = io.StringIO(read_text(path), newline="")
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        for row in csv.DictReader(text, **form):
            yield {str(name).lower(): value for name, value in row.items()}
    else:
        yield from ({"text": line} for line in text_lines(read_text(path)) if line.strip())


def _folder_rows(folder: Path) -> Iterator[dict[str, Any]]:
    files = walk_files(folder, suffixes=(".txt",))
    texts = {file.with_suffix(""): read_text(file) for file in files}
    try:
        images = image_files(folder)
    except UserError:
        yield from ({"id": file.name, "text": text} for file, text in texts.items() if file.parent == folder)
        return
    stems = Counter(file.with_suffix("") for file in (*files, *images.values()))
    if shared := [stem for stem, count in stems.items() if stem in texts and count > 2]:
        raise UserError(f"several images or texts are named '{shared[0]}'; give each image a .txt of its own name")
    for name, file in images.items():
        text = texts.get(file.with_suffix(""), "")
        yield {"file_name": name, "id": file.stem, "text": text, "captions": text_lines(text)}


def _json_rows(content: Any) -> Iterator[Any]:
    if isinstance(content, list):
        yield from content
    elif "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if len(names) < len(content["images"]):
            raise ValueError("two images with one id")
        captions: dict[Any, list[str]] = {image_id: [] for image_id in names}
        for annotation in content["annotations"]:
            try:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            except (KeyError, TypeError):
                yield annotation  # has no image or no caption: its reader counts it
        for image_id, texts in captions.items():
            yield {"image_id": image_id, "file_name": names.get(image_id), "captions": texts}
    elif isinstance(content.get("images"), list):
        yield from content["images"]
    else:
        yield from ({"file_name": name, "captions": captions} for name, captions in content.items())


def _hub_rows(path: str, *, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(path, split=split)
    except Exception as error:  # the hub client's own errors, and those of requests, pyarrow and the set's builder
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{path}' is neither a file nor an accessible hub set with a split {split} ({reason})"
        ) from None
    for batch in data.with_format("arrow").iter(batch_size=BATCH):  # images as stored, not decoded
        yield from batch.to_pylist()
