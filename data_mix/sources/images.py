"""What all readers of image files share: decoding, the cache of decoded images, and the rules for captions.

Shape legend: H = W = size of the source; C = 3, RGB.
"""

import bisect
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from data_mix.samples import BadSample, Sample
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import JSONL, list_files
from um3.core.errors import UserError
from um3.core.images import ImageError, read_image, to_square

if TYPE_CHECKING:
    from data_mix.sources.hub_streaming import HubStream

CACHE_BYTES = 256 * 2**20  # limit for the decoded images that a source keeps
# Of metadata.jsonl, of the JSON of WebDataset shards, and of files of captions.
CAPTION_FIELDS = ("captions", "caption", "text", "texts")
KEY_COLUMNS = ("key", "image_id", "id", "file_name", "filename", "image")


class ImageReader(ABC):
    """An image source that reads files: find the bytes and captions of an index, decode, crop to a square, cache."""

    stream: "HubStream | None" = None

    def __init__(self, config: ImageSourceConfig, *, size: int) -> None:
        self.name, self.size, self.has_captions = config.name, size, config.has_captions
        self.bad_files = BadFiles(config.name, skip=config.skip_bad_files)
        self._caption_table = CaptionTable(config) if config.captions and config.has_captions else None
        self._decoded: dict[int, Sample] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _key(self, index: int) -> str: ...

    @abstractmethod
    def _image(self, index: int) -> Path | bytes:
        """The encoded image; raises BadSample if there is none."""

    @abstractmethod
    def _captions(self, index: int) -> Any:
        """The captions as the data set has them: a string, a list of strings, or another value without a caption."""

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in source '{self.name}'")
        sample = self._decoded.get(index)
        if sample is None:
            key, captions = self._key(index), self.captions_of(index)
            try:
                image_HWC = to_square(read_image(self._image(index)), size=self.size)
            except ImageError as error:
                if error.reason == "cannot be read" and not self.bad_files.skip:
                    self.bad_files.add(Path(key), f"{key}: {error.message}")  # raises UserError
                raise BadSample(error.reason, detail=f"{key}: {error.message}") from None
            image_HWC.flags.writeable = False  # the cache returns the same array several times
            sample = Sample(key=key, image_HWC=image_HWC, captions=captions)
            if len(self._decoded) < CACHE_BYTES // image_HWC.nbytes:
                self._decoded[index] = sample
        return sample

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The captions of an image without reading the image; raises BadSample if it has none.

        Without `has_captions`, every image has one empty caption.
        """
        if not self.has_captions:
            return ("",)
        key = self._key(index)
        value = self._captions(index) if self._caption_table is None else self._caption_table.value(key)
        return clean_captions(value, key=key)


def clean_captions(value: Any, *, key: str) -> tuple[str, ...]:
    """The captions in `value`, each on one line, without blank and repeated ones; BadSample if there is none.

    A whole number, as of a class, is a caption.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    captions = dict.fromkeys(" ".join(str(text).split()) for text in texts if type(text) in (str, int))
    captions.pop("", None)
    if not captions:
        raise BadSample("empty caption", detail=key)
    return tuple(captions)


def caption_field(record: Any) -> Any:
    """The value of the first of CAPTION_FIELDS in a JSON object; None without one."""
    if not isinstance(record, dict):
        return None
    return next((record[field] for field in CAPTION_FIELDS if field in record), None)


class CaptionTable:
    """Captions in files of their own, by the name of the image file; recaptioned data sets are published like this.

    A key is an image's file name without folders and extension (sa_223750), or a whole number for the file name that
    ends in it (223750). The table is sorted by key and searched by bisection: 11M captions need no dictionary.
    """

    def __init__(self, config: ImageSourceConfig) -> None:
        """Read `config.captions`. UserError if there are no files, no such columns, or a file cannot be read."""
        where = f"source '{config.name}': captions '{config.captions}'"
        files = list_files(config.captions, suffixes=(".parquet", *JSONL), source=config.name)
        try:
            tables = [_read_table(str(file)) for file in files]
            names = tables[0].column_names
            key = next((name for name in KEY_COLUMNS if name in names), "")
            caption = config.caption_column or next((name for name in CAPTION_FIELDS if name in names), "")
            if not key or caption not in names:
                raise UserError(
                    f"{where} need a column of {', '.join(KEY_COLUMNS)} and one of {', '.join(CAPTION_FIELDS)} (or set "
                    f"caption_column); the columns are {', '.join(names)}"
                )
            table = pa.concat_tables([table.select([key, caption]) for table in tables], promote_options="permissive")
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from None
        table = table.drop_null()
        keys = table.column(key)
        self._has_numbers = pa.types.is_integer(keys.type)
        if not self._has_numbers:
            keys = pa.chunked_array([pa.array([_stem(str(name)) for name in keys.to_pylist()], pa.string())])
        order = pc.sort_indices(keys)
        self._keys, self._captions = keys.take(order).combine_chunks(), table.column(caption).take(order)

    def value(self, key: str) -> Any:
        """The captions of a sample's key (SHARD#STEM or a path) as the table has them; None without any."""
        stem = _stem(key.rpartition("#")[2])
        wanted: str | int = stem
        if self._has_numbers:
            wanted = int(stem[len(stem.rstrip("0123456789")) :] or -1)
        row = bisect.bisect_left(range(len(self._keys)), wanted, key=lambda row: self._keys[row].as_py())
        if row == len(self._keys) or self._keys[row].as_py() != wanted:
            return None
        return self._captions[row].as_py()


def _read_table(file: str) -> pa.Table:
    if file.endswith(".parquet"):
        return pq.read_table(file, partitioning=None)
    with pa.input_stream(file, compression="detect") as stream:
        return pyarrow.json.read_json(stream)


def _stem(name: str) -> str:
    """A file name without folders and extension."""
    return PurePosixPath(name).name.partition(".")[0]
