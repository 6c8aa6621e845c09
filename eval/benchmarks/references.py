"""Images with reference captions, in any form that `eval.tables` reads.

An image lies in IMAGES/FILEPATH/FILENAME (Karpathy's dataset_coco.json), in IMAGES/FILENAME, or in a column of a table.
Entries with a field "split" are filtered by the requested split.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval.command import SkipCounter
from eval.tables import captions_of, first_field, image_id_of, read_records
from um3.core.errors import UserError

NAME_FIELDS = ("file_name", "filename", "file")
IMAGE_FIELDS = ("image", "jpg", "png")


class ReferencedImage(NamedTuple):
    """An image (its path or its encoded bytes) with its name, its reference captions and COCO's number for it."""

    name: str
    image: Path | bytes
    references: list[str]
    image_id: str = ""


def read_references(
    path: str, *, images: str = "", split: str = "test", limit: int = 0, skipped: SkipCounter
) -> list[ReferencedImage]:
    """Read the first `limit` images of `split` (0: all) in the order of the file.

    Images are searched in the folder `images`, by default beside the file. Images without a caption and unreadable
    lines are skipped and counted.

    Raises:
        UserError: a missing file or hub set, an unknown form, no usable image, or two entries for one image.
    """
    root = Path(images) if images else Path(path) if Path(path).is_dir() else Path(path).parent
    usable = []
    try:
        for image in _read(path, root=root, split=split, skipped=skipped):
            references = [" ".join(text.split()) for text in image.references if text.strip()]
            if references:
                usable.append(image._replace(references=references))
            else:
                skipped.add("image without captions", image.name)
            if limit and len(usable) == limit:
                break
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path} cannot be read as images with captions ({reason}); eval/tables.py lists the forms"
        ) from None
    if not usable:
        raise UserError(f"{path}: no image with captions; {skipped.note() or f'check that it has a split {split}'}")
    if repeated := [name for name, count in Counter(image.name for image in usable).items() if count > 1]:
        raise UserError(f"{path} has two entries for {repeated[0]}; give each image one entry with all its captions")
    return usable


def _read(path: str, *, root: Path, split: str, skipped: SkipCounter) -> Iterator[ReferencedImage]:
    for number, (fields, place, line) in enumerate(read_records(path, split=split)):
        try:
            if fields is None:
                raise ValueError("not a JSON object")
            if fields.get("split", split) == split:
                yield _referenced_image(fields, root=root, name=f"{number:06d}")
        except (ValueError, KeyError, TypeError, AttributeError):
            if fields is not None and not line:
                raise
            skipped.add("unreadable line", Path(place).name)


def _referenced_image(fields: Mapping[str, Any], *, root: Path, name: str) -> ReferencedImage:
    """Read an image from its fields; `name` serves for encoded images without a file name.

    Raises:
        KeyError: no captions, or neither a file name nor an image.
    """
    captions, image_id = captions_of(fields), image_id_of(fields)
    data = next((fields[column] for column in IMAGE_FIELDS if fields.get(column) is not None), None)
    data = data.get("bytes") if isinstance(data, Mapping) else data
    if isinstance(data, bytes):
        name = next((str(fields[column]) for column in NAME_FIELDS if fields.get(column)), name)
        return ReferencedImage(name, data, captions, image_id)
    file, folder = fields[first_field(fields, NAME_FIELDS)], fields.get("filepath") or ""
    path = f"{folder}/{file}" if folder and (root / folder).is_dir() else file
    return ReferencedImage(path, root / path, captions, image_id)
