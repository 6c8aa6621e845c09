"""Images with reference captions, in the forms in which caption benchmarks are published.

dataset_coco.json       Karpathy's file: `split` of it, images in IMAGES/FILEPATH/FILENAME or IMAGES/FILENAME
captions_val2014.json   COCO's own annotations, images in IMAGES/FILE_NAME
*.json                  a table from file name to its captions (a text or a list)
*.jsonl                 {"file_name": ..., "captions" or "caption": ...} a line
*.parquet, owner/name   tables and hub sets, such as Karpathy's split on the hub: a column of captions, and images
                        in a column or by file name in IMAGES; where there is a column `split`, `split` of it
a folder                images with a metadata.jsonl of such lines, or a .txt of the same name beside each
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval.command import LeftOut
from um3.core.errors import UserError
from um3.core.images import SUFFIXES

CAPTION_FIELDS = ("sentences_raw", "captions", "caption", "sentences", "answer", "text", "prompt")
NAME_FIELDS = ("file_name", "filename", "file")
IMAGE_FIELDS = ("image", "jpg", "png")
METADATA = "metadata.jsonl"


class Referenced(NamedTuple):
    """An image by name, where it lies or its bytes, with its reference captions and COCO's number for it."""

    name: str
    image: Path | bytes
    references: list[str]
    image_id: str = ""


def read_references(
    path: str, *, images: str = "", split: str = "test", limit: int = 0, left_out: LeftOut
) -> list[Referenced]:
    """The images of `split` in the order of the file, at most `limit` of them (0: all); they lie in the folder
    `images`, or beside the file. Images without a caption and lines that cannot be read are left out.

    Raises:
        UserError: no such file or hub set, one of another form, or no usable image in it.
    """
    root = Path(images) if images else Path(path) if Path(path).is_dir() else Path(path).parent
    usable = []
    try:
        for each in _read(path, root=root, split=split, left_out=left_out):
            references = [" ".join(text.split()) for text in each.references if text.strip()]
            if references:
                usable.append(each._replace(references=references))
            else:
                left_out.add("image without captions", each.name)
            if limit and len(usable) == limit:
                break
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path} cannot be read as images with captions ({reason}); see eval/benchmarks/references.py"
        ) from None
    if not usable:
        raise UserError(f"{path} holds no image with captions; {left_out.note() or f'is there a split {split}?'}")
    if again := next((name for name, count in Counter(each.name for each in usable).items() if count > 1), ""):
        raise UserError(f"{path} names {again} twice; give each image one entry with all its captions")
    return usable


def _read(path: str, *, root: Path, split: str, left_out: LeftOut) -> Iterator[Referenced]:
    place = Path(path)
    if place.is_dir() and not any(place.rglob("*.parquet")):
        if (place / METADATA).is_file():
            yield from _from_lines(place / METADATA, root=root, left_out=left_out)
        else:
            yield from _from_sidecars(place)
    elif place.suffix == ".jsonl":
        yield from _from_lines(place, root=root, left_out=left_out)
    elif place.suffix == ".json":
        content = json.loads(place.read_bytes())
        if "annotations" in content:
            yield from _from_annotations(content, root=root)
        elif isinstance(content.get("images"), list):
            yield from (_from_row(each, root=root) for each in content["images"] if each["split"] == split)
        else:
            yield from (Referenced(name, root / name, _texts(given)) for name, given in content.items())
    else:
        rows = _parquet_rows(place, split=split) if place.exists() else _hub_rows(path, split=split)
        for number, row in enumerate(rows):
            if row.get("split", split) == split:
                yield _from_row(row, root=root, name=f"{number:06d}")


def _from_lines(file: Path, *, root: Path, left_out: LeftOut) -> Iterator[Referenced]:
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _from_row(json.loads(line), root=root)
        except (ValueError, KeyError, TypeError, AttributeError):
            left_out.add("unreadable line", f"{file.name}:{number}")


def _from_sidecars(folder: Path) -> Iterator[Referenced]:
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES):
        captions = file.with_suffix(".txt")
        given = captions.read_text(encoding="utf-8-sig").split("\n") if captions.is_file() else []
        yield Referenced(file.relative_to(folder).as_posix(), file, given)


def _from_annotations(content: Mapping[str, Any], *, root: Path) -> Iterator[Referenced]:
    captions: dict[Any, list[str]] = {}
    for note in content["annotations"]:
        captions.setdefault(note["image_id"], []).append(note["caption"])
    for image in content["images"]:
        name = image["file_name"]
        yield Referenced(name, root / name, captions.get(image["id"], []), str(image["id"]))


def _from_row(row: Mapping[str, Any], *, root: Path, name: str = "") -> Referenced:
    """One image as a mapping; `name` where its row has none.

    Raises:
        KeyError: no captions, or neither a name nor an image.
    """
    given = row[_first(row, CAPTION_FIELDS)]
    image_id = str(row.get("cocoid", row.get("image_id", "")))
    column = next((field for field in IMAGE_FIELDS if row.get(field) is not None), "")
    data = row[column] if column else None
    data = data.get("bytes") if isinstance(data, Mapping) else data
    if isinstance(data, bytes):
        return Referenced(
            str(next((row[field] for field in NAME_FIELDS if row.get(field)), name)), data, _texts(given), image_id
        )
    file = row[_first(row, NAME_FIELDS)]
    folder = row.get("filepath") or ""
    below = f"{folder}/{file}" if folder and (root / folder).is_dir() else file
    return Referenced(below, root / below, _texts(given), image_id)


def _first(row: Mapping[str, Any], fields: Iterable[str]) -> str:
    found = next((field for field in fields if row.get(field) is not None), None)
    if found is None:
        raise KeyError(f"none of {', '.join(fields)}")
    return found


def _texts(given: Any) -> list[str]:
    """A caption, several, or Karpathy's sentences; what is no text is none."""
    values = given if isinstance(given, list | tuple) else [given]
    texts = [value.get("raw") if isinstance(value, Mapping) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def _parquet_rows(place: Path, *, split: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    files = [file for file in files if split in file.stem.lower()] or files
    for file in files:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64):
                yield from batch.to_pylist()


def _hub_rows(path: str, *, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(path, split=split)
    except Exception as error:  # the hub client raises its own, requests', pyarrow's and the builder's errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{path}' is no file, and no hub set with a split {split} that can be reached ({reason})"
        ) from None
    for batch in data.with_format("arrow").iter(batch_size=64):  # images as they are stored, not decoded
        yield from batch.to_pylist()
