"""Images of your own: a folder, or a table (parquet, hub). Whatever is wrong with one of them is a BadSample.

Shape legend: H = W = the size asked for; C = 3, RGB.
"""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.samples import BadSample, Sample, Split
from data_mix.sources.bad_files import SetAside
from data_mix.sources.caption_table import CaptionTable
from data_mix.sources.hub_streaming import StreamedPart
from data_mix.sources.splits import SPLIT_WORDS, choose_rows
from data_mix.sources.tables import TablePart
from um3.core.errors import UserError
from um3.core.images import SUFFIXES, ImageError, read_image, to_square

CACHE_BYTES = 512 * 2**20  # of decoded squares, all sources of a process together
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "photo")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "txt", "sentences", "description", "prompt")
CAPTION_FIELDS = ("captions", "caption", "text", "texts")  # of metadata.jsonl and of JSON in WebDataset shards


class DecodedCache:
    """Samples of one source, kept while the caches of the process together stay below CACHE_BYTES."""

    _used_bytes = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._samples: dict[int, Sample] = {}
        self._own_bytes = 0

    def get(self, index: int) -> Sample | None:
        return self._samples.get(index)

    def put(self, index: int, sample: Sample) -> None:
        num_bytes = sample.image_HWC.nbytes
        with DecodedCache._lock:
            if index in self._samples or DecodedCache._used_bytes + num_bytes > CACHE_BYTES:
                return
            DecodedCache._used_bytes += num_bytes
            self._own_bytes += num_bytes
            self._samples[index] = sample

    def __del__(self) -> None:
        with DecodedCache._lock:
            DecodedCache._used_bytes -= self._own_bytes


class OwnImages(ABC):
    """The common part: find the bytes and captions of an index, decode, crop, cache.

    Without captions every image has the empty one; those of `captions`, where it is set, take their place.
    """

    def __init__(self, *, name: str, size: int, has_captions: bool = True) -> None:
        self.name = name
        self.size = size
        self.has_captions = has_captions
        self.set_aside = SetAside(name)
        self.captions: CaptionTable | None = None
        self._cache = DecodedCache()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _key(self, index: int) -> str: ...

    @abstractmethod
    def _image(self, index: int) -> Path | bytes:
        """The encoded image; BadSample when there is none."""

    @abstractmethod
    def _captions(self, index: int) -> Any:
        """A string, a list of strings, or something else that holds no caption."""

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in source '{self.name}'")
        sample = self._cache.get(index)
        if sample is None:
            key, captions = self._key(index), self.captions_of(index)
            try:
                image_HWC = to_square(read_image(self._image(index)), size=self.size)
            except ImageError as error:
                raise BadSample(error.reason, detail=f"{key}: {error.message}") from None
            image_HWC.flags.writeable = False  # it is given out many times
            sample = Sample(key=key, image_HWC=image_HWC, captions=captions)
            self._cache.put(index, sample)
        return sample

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The captions of an image, without reading the image; BadSample when there is none."""
        key = self._key(index)
        if self.captions is not None:
            return clean_captions(self.captions.of(key), key=key)
        return clean_captions(self._captions(index), key=key) if self.has_captions else ("",)


def clean_captions(value: Any, *, key: str) -> tuple[str, ...]:
    """The captions on one line each, without blanks and repetitions; BadSample when none is left. A number of a class
    is one too."""
    texts = value if isinstance(value, list | tuple) else [value]
    captions = dict.fromkeys(" ".join(str(text).split()) for text in texts if type(text) in (str, int))
    captions.pop("", None)
    if not captions:
        raise BadSample("empty caption", detail=key)
    return tuple(captions)


# --- folders


class ListedImages(OwnImages):
    """Images that are files of their own: `_keys` are their paths below `_root`."""

    _root: Path
    _keys: Sequence[str]

    def __len__(self) -> int:
        return len(self._keys)

    def _key(self, index: int) -> str:
        return self._keys[index]

    def _image(self, index: int) -> Path:
        return self._root / self._keys[index]


class FolderImages(ListedImages):
    """Every image below a folder, with captions from metadata.jsonl or a .txt file of the same name.

    metadata.jsonl may lie in any folder and speaks of the files in and below it: {"file_name": ..., "caption"
    or "captions" or "text": ...}. In a .txt file every line is a caption. If every image lies in a top folder
    called train, val, validation or test, these are the splits; otherwise they are made by hash of the path.
    """

    def __init__(
        self, path: str, *, name: str, split: Split, size: int, val_fraction: float, has_captions: bool = True
    ) -> None:
        super().__init__(name=name, size=size, has_captions=has_captions)
        root = Path(path)
        where = f"source '{name}' ({path})"
        if not root.is_dir():
            raise UserError(f"source '{name}': no folder at '{path}'; check the path")
        files = sorted(file for file in root.rglob("*") if _is_visible_image(file, root=root))
        if not files:
            raise UserError(f"{where}: no image in it ({' '.join(SUFFIXES)})")
        captions = _metadata_captions(root, where=where) if has_captions else {}
        if has_captions and not any(file in captions or file.with_suffix(".txt").is_file() for file in files):
            raise UserError(
                f"{where}: none of its {len(files)} images has a caption; put a .txt of the same name beside each, "
                "or a metadata.jsonl with file_name and caption, or set has_captions=false where none is read"
            )
        keys = [file.relative_to(root).as_posix() for file in files]
        tops = [key.split("/")[0].lower() if "/" in key else "" for key in keys]
        self._root = root
        rows = choose_rows(
            num_rows=len(keys),
            labels=tops if SPLIT_WORDS.issuperset(tops) else None,
            key_of=keys.__getitem__,
            split=split,
            val_fraction=val_fraction,
            where=where,
        )
        self._keys = [keys[row] for row in rows]
        self._written = {key: captions[root / key] for key in self._keys if root / key in captions}

    def _captions(self, index: int) -> Any:
        key = self._keys[index]
        if key in self._written:
            return self._written[key]
        sidecar = (self._root / key).with_suffix(".txt")
        try:
            return sidecar.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise BadSample("no caption", detail=key) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample("unreadable caption", detail=f"{sidecar}: {error}") from None


def _is_visible_image(file: Path, *, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.is_file()


def _metadata_captions(root: Path, *, where: str) -> dict[Path, Any]:
    """Image path -> its captions as written, of all metadata.jsonl files below `root`."""
    captions: dict[Path, Any] = {}
    for file in sorted(root.rglob("metadata.jsonl")):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    image = file.parent / record["file_name"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{where}: {file}:{number} is no JSON object with file_name ({type(error).__name__}: {error})"
                    ) from None
                captions[image] = caption_field(record)
    return captions


def caption_field(record: Any) -> Any:
    """The captions in a JSON object, under any of CAPTION_FIELDS."""
    if not isinstance(record, dict):
        return None
    return next((record[field] for field in CAPTION_FIELDS if field in record), None)


# --- tables


class TableImages(OwnImages):
    """Images and captions in two columns of a table."""

    def __init__(
        self,
        part: TablePart | StreamedPart,
        *,
        name: str,
        size: int,
        image_column: str,
        caption_column: str,
        has_captions: bool = True,
    ) -> None:
        super().__init__(name=name, size=size, has_captions=has_captions)
        self._part, self.set_aside = part, part.set_aside
        self.streamed = part if isinstance(part, StreamedPart) else None
        self._image_column = image_column
        self._caption_column = caption_column

    def __len__(self) -> int:
        return len(self._part)

    def _key(self, index: int) -> str:
        return self._part.key(index)

    def _image(self, index: int) -> Path | bytes:
        value = self._part.value(index, column=self._image_column)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not data and path and self._part.has_files:
            return self._part.file(path)
        if not data:
            raise BadSample("no image", detail=self._key(index))
        return data

    def _captions(self, index: int) -> Any:
        return self._part.value(index, column=self._caption_column)


def image_columns(
    schema: pa.Schema,
    *,
    image_column: str,
    caption_column: str,
    where: str,
    has_captions: bool = True,
    classes: bool = False,
) -> tuple[str, str]:
    """The names of the image and the caption column: as given, else found by name and type; without captions only the
    first. With `classes` the captions may be whole numbers.

    Raises:
        UserError: a given column is missing or holds something else, or none can be found.
    """
    images = [field.name for field in schema if _holds_images(field.type)]
    texts = [field.name for field in schema if _holds_text(field.type) or (classes and pa.types.is_integer(field.type))]
    image = image_column or _preferred(images, IMAGE_COLUMNS) or (images[0] if len(images) == 1 else "")
    caption = caption_column or _preferred(texts, CAPTION_COLUMNS)
    for kind, column, fit in (("image", image, images), ("caption", caption, texts))[: 1 + has_captions]:
        if not column:
            links = kind == "image" and {"url", "image_url"} & {name.lower() for name in schema.names}
            remedy = "download its links with img2dataset --output_format webdataset" if links else f"set {kind}_column"
            raise UserError(f"{where}: cannot tell the {kind} column among {', '.join(schema.names)}; {remedy}")
        if column not in schema.names:
            raise UserError(f"{where}: no column '{column}' (has: {', '.join(schema.names)}); set {kind}_column")
        if column not in fit:
            expected = "image bytes" if kind == "image" else "text or lists of text"
            held = schema.field(column).type
            raise UserError(f"{where}: column '{column}' holds {held}, not {expected}; set {kind}_column")
    return image, caption


def _preferred(columns: Iterable[str], order: Sequence[str]) -> str:
    by_word = {column.lower(): column for column in columns}
    return next((by_word[word] for word in order if word in by_word), "")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
