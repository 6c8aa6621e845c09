"""One reader for the files in which benchmarks publish prompts, reference captions and results.

.jsonl           one JSON object a line
.csv .tsv        a table; column names are read in lower case
.json            COCO's annotations, Karpathy's dataset_coco.json, {file name: captions}, or a list of objects
.parquet         a table
owner/name       a data set of the Hugging Face hub
a folder         .parquet files; images with a metadata.jsonl or with a .txt of the same name each; or .txt files
any other file   one text a line, in the field "text"

`datasets` reads only the hub sets: for the other forms it requires equal fields on every line, stops at the first
damaged one without its number, and stores a second copy.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.images import SUFFIXES

METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("sentences_raw", "captions", "caption", "sentences", "answer", "text", "prompt")
BATCH = 64


class Record(NamedTuple):
    """One entry of a file.

    Args:
        fields: the entry's values by name; None if the line is not a JSON object.
        place: where it stands, for messages.
        line: the JSON line; empty for other forms.
    """

    fields: dict[str, Any] | None
    place: str
    line: str = ""


def read_records(path: str | Path, *, split: str = "") -> Iterator[Record]:
    """Read the records of a file, a folder or a hub set in their order.

    `split` names the part of a hub set. In a folder of .parquet files it selects those with `split` in their name, if
    there are any. A record that has a field "split" is returned whatever its split.

    Raises:
        UserError: `path` is neither a file, a folder nor an accessible hub set.
        ValueError, TypeError, KeyError, AttributeError, csv.Error, OSError: the content has another form.
    """
    place = Path(path)
    if place.suffix == ".jsonl":
        yield from json_lines(place)
    elif place.is_dir() and (place / METADATA).is_file():
        yield from json_lines(place / METADATA)
    else:
        for number, row in enumerate(_rows(place, split=split), start=1):
            yield Record(row if isinstance(row, dict) else None, f"{path}, record {number}")


def json_lines(path: Path) -> Iterator[Record]:
    """Read the lines of a .jsonl file; blank lines are ignored.

    Lines end with "\\n" only: `str.splitlines` would also cut at U+2028 inside a text.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            try:
                line = data.decode("utf-8-sig").rstrip("\r\n")
                fields = json.loads(line)
            except ValueError:
                line, fields = "", None
            yield Record(fields if isinstance(fields, dict) else None, f"{path}:{number}", line)


def image_files(folder: Path) -> dict[str, Path]:
    """Find all images below a folder, by their names below it, sorted; hidden files are ignored.

    Raises:
        UserError: there are none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise UserError(f"{folder} contains no images ({' '.join(SUFFIXES)}); give a folder of images")
    return {file.relative_to(folder).as_posix(): file for file in files}


def captions_of(fields: Mapping[str, Any]) -> list[str]:
    """The captions of a record: a text, a list of texts, or Karpathy's sentences; other values are ignored.

    Raises:
        KeyError: the record has none of `CAPTION_FIELDS`.
    """
    content = fields[first_field(fields, CAPTION_FIELDS)]
    values = content if isinstance(content, list | tuple) else [content]
    texts = [value.get("raw") if isinstance(value, Mapping) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def image_id_of(fields: Mapping[str, Any]) -> str:
    """COCO's number of a record's image; empty without one."""
    return str(fields.get("cocoid", fields.get("image_id", "")))


def first_field(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of `names` that has a value.

    Raises:
        KeyError: none has.
    """
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        raise KeyError(f"none of {', '.join(names)}")
    return name


def _rows(path: Path, *, split: str) -> Iterator[Any]:
    tables = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] * (path.suffix == ".parquet")
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
        yield from _json_rows(json.loads(path.read_bytes()))
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                yield {str(name).lower(): value for name, value in row.items()}
    else:
        yield from ({"text": line} for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())


def _folder_rows(folder: Path) -> Iterator[dict[str, Any]]:
    texts = {file.with_suffix(""): file.read_text(encoding="utf-8-sig") for file in sorted(folder.rglob("*.txt"))}
    try:
        images = image_files(folder)
    except UserError:
        yield from ({"id": file.name, "text": text} for file, text in texts.items() if file.parent == folder)
        return
    for name, file in images.items():
        text = texts.get(file.with_suffix(""), "")
        yield {"file_name": name, "id": file.stem, "text": text, "captions": text.split("\n")}


def _json_rows(content: Any) -> Iterator[Any]:
    if isinstance(content, list):
        yield from content
    elif "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[Any, list[str]] = {image_id: [] for image_id in names}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
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
