"""Images with reference captions, in any form that `eval.tables` reads.

An image lies in IMAGES/FILEPATH/FILENAME (Karpathy's dataset_coco.json), in IMAGES/FILENAME, or in a column of a table.
Entries with a field "split" are filtered by the requested split.
"""

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

    Images are searched in the folder `images`, by default beside the file. Several entries for one image are its
    captions together. Entries without a caption or an image are skipped and counted, alike in every form. UserError for
    a missing file or hub set, an unknown form, no usable image, or two images of one name.
    """
    root = Path(images) if images else Path(path) if Path(path).is_dir() else Path(path).parent
    usable: dict[str, ReferencedImage] = {}
    try:
        for image in _read(path, root=root, split=split, skipped=skipped):
            known = usable.get(image.name)
            if known and known.image != image.image:
                raise UserError(f"{path} has two images of the name '{image.name}'; rename one of them")
            if limit and len(usable) == limit and not known:
                continue  # further captions of the images so far can follow
            references = [" ".join(text.split()) for text in image.references if text.strip()]
            if references:
                usable[image.name] = image._replace(references=[*(known.references if known else ()), *references])
            else:
                skipped.add("image without captions", image.name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"{path} cannot be read as images with captions ({reason})"
        raise UserError(f"{problem}; eval/tables.py lists the forms") from None
    if not usable:
        raise UserError(f"{path}: no image with captions; {skipped.note() or f'check that it has a split {split}'}")
    return [*usable.values()]


def _read(path: str, *, root: Path, split: str, skipped: SkipCounter) -> Iterator[ReferencedImage]:
    for number, (fields, place, _) in enumerate(read_records(path, split=split)):
        if fields is None:
            skipped.add("not a JSON object", Path(place).name)
        elif fields.get("split", split) == split:
            try:
                image = _referenced_image(fields, root=root, name=f"{number:06d}")
            except KeyError as error:
                skipped.add(f"entry with {error.args[0]}", Path(place).name)
            else:
                yield image


def _referenced_image(fields: Mapping[str, Any], *, root: Path, name: str) -> ReferencedImage:
    """Read an image from its fields; `name` serves for encoded images without a file name.

    KeyError without captions, or with neither a file name nor an image.
    """
    captions, image_id = captions_of(fields), image_id_of(fields)
    data = next((fields[column] for column in IMAGE_FIELDS if fields.get(column) is not None), None)
    data = data.get("bytes") if isinstance(data, Mapping) else data
    names = {column: str(fields[column]) for column in NAME_FIELDS if fields.get(column)}
    if isinstance(data, bytes):
        return ReferencedImage(next(iter(names.values()), name), data, captions, image_id)
    file, folder = names[first_field(names, NAME_FIELDS)], str(fields.get("filepath") or "")
    path = f"{folder}/{file}" if folder and (root / folder).is_dir() else file
    return ReferencedImage(path, root / path, captions, image_id)
