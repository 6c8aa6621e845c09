"""What all readers of image files share: decoding, the cache of decoded images, and the rules for captions.

Shape legend: H = W = size of the source; C = 3, RGB.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from PIL import Image

from data_mix.samples import BadSample, Sample
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import CAPTION_SUFFIXES, list_files, read_records
from um3.core.errors import UserError
from um3.core.images import SUFFIXES, ImageError, read_image, to_square
from um3.core.text import text_lines, valid_text

# Of metadata.jsonl, of the JSON of WebDataset shards, and of files of captions.
CAPTION_FIELDS = ("captions", "caption", "text", "texts")
KEY_COLUMNS = ("file_name", "filename", "image", "key", "image_id", "id")  # a name says more than an id
SUFFIX = rf"(?i)({'|'.join(map(re.escape, SUFFIXES))})$"
END_NUMBER = r"(?s)^.*?0*(\d+)$"
UNREADABLE_CAPTION = "unreadable caption"
CACHE_BYTES = 256 * 2**20  # limit for the decoded images that a source keeps


class ImageReader(ABC):
    """An image source that reads files: find the bytes and captions of an index, decode, crop to a square, cache."""

    fingerprint: Callable[[], str]

    def __init__(self, config: ImageSourceConfig, *, size: int, rows: Any = None) -> None:
        """rows: the samples of the split, with a length, `bad_files` and `key(index)`; None if they are set later."""
        self.name, self.size, self.has_captions = config.name, size, config.has_captions
        self.rows, self._config = rows, config
        self.bad_files = BadFiles(config.name, skip=config.skip_bad_files) if rows is None else rows.bad_files
        self._caption_table: CaptionTable | None = None
        self._decoded: dict[int, Sample] = {}

    def _read_captions(self, paths: Iterable[str], chosen: np.ndarray) -> None:
        """Read `config.captions`, if it is set, for the images with the numbers `chosen` of all `paths`."""
        if self._config.captions and self.has_captions:
            self._caption_table = CaptionTable(self._config, paths, chosen, bad_files=self.bad_files)

    def __len__(self) -> int:
        return len(self.rows)

    def _key(self, index: int) -> str:
        return str(self.rows.key(index))

    @abstractmethod
    def _image(self, index: int) -> Path | bytes:
        """The encoded image; raises BadSample if there is none."""

    @abstractmethod
    def _captions(self, index: int) -> Any:
        """The captions as the data set has them: a string, a list of strings, bytes of one caption a line, or another
        value without a caption. OSError if they cannot be read."""

    def original(self, index: int) -> Image.Image:
        """The whole image in its own size; BadSample if it cannot be read."""
        try:
            return read_image(self._image(index))
        except ImageError as error:
            key = self._key(index)
            if error.reason == "cannot be read" and not self.bad_files.skip:
                self.bad_files.add(Path(key), f"{key}: {error.message}")  # raises UserError
            raise BadSample(error.reason, detail=f"{key}: {error.message}") from None

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in source '{self.name}'")
        sample = self._decoded.get(index)
        if sample is None:
            captions = self.captions_of(index)
            image_HWC = to_square(self.original(index), size=self.size)
            image_HWC.flags.writeable = False  # the cache returns the same array several times
            sample = Sample(key=valid_text(self._key(index)), image_HWC=image_HWC, captions=captions)
            if len(self._decoded) < CACHE_BYTES // image_HWC.nbytes:
                self._decoded[index] = sample
        return sample

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The captions of an image without reading it, each on one line, without repeated ones; BadSample without any.

        Without `has_captions`, every image has one empty caption. A whole number, as of a class, is a caption.
        """
        if not self.has_captions:
            return ("",)
        try:
            value = self._captions(index) if self._caption_table is None else self._caption_table.value(index)
            value = text_lines(value.decode("utf-8-sig")) if isinstance(value, bytes) else value
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(UNREADABLE_CAPTION, detail=f"{self._key(index)}: {error}") from None
        texts = value if isinstance(value, list | tuple) else [value]
        captions = dict.fromkeys(" ".join(valid_text(str(text)).split()) for text in texts if type(text) in (str, int))
        captions.pop("", None)
        if not captions:
            raise BadSample("empty caption", detail=self._key(index))
        return tuple(captions)


class CaptionTable:
    """The captions of images by their file names (sa_223750.jpg), or by the whole numbers in which those end (223750).

    Names are compared without the suffix of an image, and without folders if that tells all images and all names apart,
    else with as many folders as it takes, and at last with the suffix. Arrow matches all at once, for 11M captions.
    """

    def __init__(self, config: ImageSourceConfig, paths: Iterable[str], chosen: np.ndarray, *, bad_files: BadFiles):
        """Read `config.captions` for all images of a source, of which those with the numbers `chosen` are used."""
        self._where = f"source '{config.name}': captions '{config.captions}'"
        files = list_files(config.captions, suffixes=CAPTION_SUFFIXES, source=config.name)
        try:
            tables = [self._read(file, column=config.caption_column, bad_files=bad_files) for file in files]
            whole = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._where} cannot be read: {' '.join(str(error).split())}") from None
        table = whole.drop_null()
        self._captions = table.column("caption")
        images = pa.array(map(valid_text, paths), pa.large_string())
        rows, groups = self._match(table.column("key"), images)
        unmatched = np.flatnonzero(~np.isin(rows, groups))
        if len(whole) > len(table):
            bad_files.count("no name or no caption", config.captions, number=len(whole) - len(table))
        if len(unmatched):
            bad_files.count("names no image", str(table.column("key")[int(unmatched[0])]), number=len(unmatched))
        self._order = np.argsort(rows, kind="stable")
        self._starts = np.searchsorted(rows[self._order], np.arange(rows.max() + 2))
        self._groups = groups[chosen]

    def value(self, index: int) -> list[Any]:
        """The captions of a sample, as the table has them."""
        group = self._groups[index]
        first, end = self._starts[group : group + 2] if group >= 0 else (0, 0)
        values = [self._captions[int(row)].as_py() for row in self._order[first:end]]
        return [text for value in values for text in (value if isinstance(value, list) else [value])]

    def _read(self, file: Path, *, column: str, bad_files: BadFiles) -> pa.Table:
        """The columns "key" and "caption" of a file, in types that may hold more than 2 GiB."""
        is_parquet = file.suffix.lower() == ".parquet"
        # Arrow opens no path that is not UTF-8.
        table = pq.ParquetFile(file.open("rb")) if is_parquet else _read_jsonl(file, column=column, bad_files=bad_files)
        names = table.schema_arrow.names if is_parquet else table.column_names
        key = next((name for name in KEY_COLUMNS if name in names), "")
        caption = column or next((name for name in CAPTION_FIELDS if name in names), "")
        if not key or caption not in names:
            wanted = f"{', '.join(KEY_COLUMNS)} and one of {', '.join(CAPTION_FIELDS)} (or set caption_column)"
            raise UserError(f"{self._where} need a column of {wanted}; the columns are {', '.join(names)}")
        keys, captions = (table.read([key, caption]) if is_parquet else table).select([key, caption]).columns
        return pa.table({"key": keys.cast(pa.large_string()), "caption": _as_lists(captions)})

    def _match(self, keys: pa.ChunkedArray, images: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the name of each row and each image, the same for a pair; -1 for an image without a row."""
        keys, images = _normalised(keys), _normalised(images)
        paths = keys.unique()
        problem = f"names none of its {len(images)} images, such as '{images[0]}'"
        for names, wanted in _comparisons(paths, images):
            distinct = names.unique()
            groups_of_paths = pc.index_in(names, value_set=distinct).to_numpy()
            groups = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
            num_paths = np.bincount(groups_of_paths, minlength=len(distinct))
            num_images = np.bincount(groups[groups >= 0], minlength=len(distinct))
            collided = np.flatnonzero((num_images > 1) | ((num_images == 1) & (num_paths > 1)))
            if num_images.any() and not len(collided):
                return groups_of_paths[pc.index_in(keys, value_set=paths).to_numpy()], groups
            if len(collided) and "may be" not in problem:
                pair = [images[int(number)].as_py() for number in np.flatnonzero(groups == collided[0])[:2]]
                problem = f"'{distinct[int(collided[0])]}' may be the name of {' and '.join(pair)}"
        raise UserError(f"{self._where}: {problem}; write the names there with folder and suffix")


def _comparisons(paths: pa.Array, images: pa.Array) -> Iterator[list[pa.Array]]:
    """`paths` and `images` in the forms in which they may be equal, one after the other (see CaptionTable)."""
    stems = [pc.replace_substring_regex(names, SUFFIX, "") for names in (paths, images)]
    if pc.all(pc.match_substring_regex(stems[0], r"^\d+$")).as_py():
        yield [pc.replace_substring_regex(names, END_NUMBER, r"\1") for names in stems]
    for count in range(1, 2 + (pc.max(pc.count_substring(paths, "/")).as_py() or 0)):
        last_parts = rf"(?s)^.*/((?:[^/]*/){{{count - 1}}}[^/]*)$"
        for pair in (stems, [paths, images]):
            yield [pc.replace_substring_regex(names, last_parts, r"\1") for names in pair]


def _read_jsonl(file: Path, *, column: str, bad_files: BadFiles) -> pa.Table:
    """All columns of a file of JSON lines; if Arrow refuses a line, key and caption of the others, read one by one."""

    def use(record: dict[str, Any]) -> dict[str, Any]:
        key = record[next((name for name in KEY_COLUMNS if name in record), KEY_COLUMNS[0])]
        value = record[column] if column else caption_field(record)
        texts = value if isinstance(value, list) else [value]
        return {"key": valid_text(str(key)), column or "caption": [valid_text(text) for text in texts]}

    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            table = pyarrow.json.read_json(stream)
        used = {*KEY_COLUMNS, *CAPTION_FIELDS, column}
        types = [getattr(field.type, "value_type", field.type) for field in table.schema if field.name in used]
        if not any(map(pa.types.is_temporal, types)):  # Arrow would write the name 2021-03-04 in another form
            return table
    except (pa.ArrowException, UnicodeError):
        pass
    records = read_records(file, use, reason="no name or no caption", bad_files=bad_files)
    return pa.Table.from_pylist([record for _, record in records])


def _as_lists(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Captions as lists of strings, whether a row has one or several, so that tables of both kinds go together."""
    kind = pa.list_(pa.large_string())
    if pa.types.is_list(captions.type) or pa.types.is_large_list(captions.type):
        return captions.cast(kind)
    chunks = captions.cast(pa.large_string()).chunks
    lists = [pa.ListArray.from_arrays(np.arange(len(c) + 1, dtype=np.int32), c, mask=c.is_null()) for c in chunks]
    return pa.chunked_array(lists, kind)


def caption_field(record: dict[str, Any]) -> Any:
    """The value of the first of CAPTION_FIELDS in a JSON object; None without one."""
    return next((record[field] for field in CAPTION_FIELDS if field in record), None)


def _normalised(names: Any) -> Any:
    names = pc.replace_substring(pc.utf8_normalize(names, form="NFC"), "\\", "/")
    return pc.replace_substring_regex(names, r"^(\./)+", "")
