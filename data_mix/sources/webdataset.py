"""WebDataset shards: tar files in which an image and its captions lie side by side under one stem.

The members are listed when the source is opened (`data_mix.sources.file_index`), and a sample is read at its offset.
Nothing is extracted, so a member called ../x and a link are only names. The samples of an unreadable shard raise
BadSample.
"""

import functools
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import DamagedFile
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.file_index import FileIndex, Listing
from data_mix.sources.files import IMAGE_KINDS
from data_mix.sources.images import ImageReader, caption_field
from um3.core.images import MAX_FILE_BYTES

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json", "cls")
MAX_CAPTION_BYTES = 2**20
# Where an image and its caption lie in their shard; the places of a caption are null without one.
PLACES = ("image_offset", "image_size", "caption_offset", "caption_size")
SCHEMA = pa.schema([("stem", pa.large_binary()), *((name, pa.int64()) for name in PLACES), ("is_json", pa.bool_())])


class WebDatasetImages(ImageReader):
    """The images of all shards at a path.

    `caption_column` "txt" takes the captions from stem.txt (one a line), "cls" from stem.cls, another name from that
    field of stem.json; empty takes stem.txt if it exists, else the caption field of stem.json.
    """

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        super().__init__(config, size=size)
        self._column = "" if config.captions else config.caption_column
        self._where = config.where
        self._index = FileIndex(
            config,
            split=split,
            suffixes=IMAGE_KINDS["webdataset"],
            schema=SCHEMA,
            kind=f"webdataset-{self._column or 'any'}",
            list_file=self._list_shard,
            bad_files=self.bad_files,
        )

    def __len__(self) -> int:
        return len(self._index)

    def _key(self, index: int) -> str:
        return self._index.key(index)

    def _image(self, index: int) -> bytes:
        return self._read(index, "image", limit=MAX_FILE_BYTES)[0]

    def _captions(self, index: int) -> Any:
        data, is_json = self._read(index, "caption", limit=MAX_CAPTION_BYTES)
        try:
            if not is_json:
                return data.decode("utf-8-sig").splitlines()
            record = json.loads(data)
            return record.get(self._column) if self._column and isinstance(record, dict) else caption_field(record)
        except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
            raise BadSample("unreadable caption", detail=f"{self._key(index)}: {error}") from None

    def _read(self, index: int, member: str, *, limit: int) -> tuple[bytes, bool]:
        """The bytes of a sample's "image" or "caption", and whether the caption is JSON."""
        entry = self._index.entry(index)
        offset, size, shard = entry[f"{member}_offset"], entry[f"{member}_size"], self._index.files[entry["file"]]
        if offset is None:
            raise BadSample(f"no {member}", detail=self._key(index))
        if size > limit:
            raise BadSample("too large", detail=f"{self._key(index)}: {size:,} bytes, {limit:,} allowed")
        data = self.bad_files.read(shard, functools.partial(_bytes_at, shard, offset=offset, size=size))
        if len(data) < size:
            raise BadSample("truncated", detail=self._key(index))
        return data, entry["is_json"]

    def _list_shard(self, shard: Path) -> Listing:
        """The samples of one shard in the order of their images."""
        members: dict[str, dict[str, tuple[int, int]]] = {}
        damage = ""
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    stem, extension = _stem_and_extension(member.name)
                    # A sparse member is not stored in one piece, so an offset does not find it.
                    is_file = member.isreg() and not member.issparse()
                    if is_file and extension in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
                        members.setdefault(stem, {}).setdefault(extension, (member.offset_data, member.size))
        except (tarfile.TarError, EOFError, ValueError) as error:
            if not members:
                reason = f"'{shard}' is not an uncompressed tar file ({error}); unpack .tar.gz first"
                raise DamagedFile(f"{self._where}: {reason}") from None
            damage = str(error)
        if members and not damage and not _has_end_mark(shard):
            damage = "cut off"  # tarfile takes a file that was cut within a header for a complete one
        if damage and not self.bad_files.skip:
            raise DamagedFile(f"{self._where}: '{shard}' is damaged ({damage})")
        if damage:
            logger.warning("%s: '%s' is damaged (%s); using the samples before the damage", self._where, shard, damage)
        entries = list(_entries(members, column=self._column))
        return Listing(pa.Table.from_pylist(entries, schema=SCHEMA), is_whole=not damage)


def _bytes_at(shard: Path, *, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _entries(members: dict[str, dict[str, tuple[int, int]]], *, column: str) -> Iterator[dict[str, Any]]:
    """Index entries (see SCHEMA) of the stems that have an image; `members`: offset and size by stem and extension."""
    captions = ("txt", "json") if not column else (column,) if column in ("txt", "cls") else ("json",)
    for stem, places in members.items():
        image = next((places[extension] for extension in IMAGE_EXTENSIONS if extension in places), None)
        extension = next((extension for extension in captions if extension in places), "")
        if image is not None:
            name = stem.encode("utf-8", "surrogateescape")  # a name in a tar may be any bytes
            numbers = (*image, *places.get(extension, (None, None)))
            yield {"stem": name, "is_json": extension == "json"} | dict(zip(PLACES, numbers, strict=True))


def _has_end_mark(shard: Path) -> bool:
    """Whether the tar ends in a block of zeros, as a complete one does."""
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - tarfile.BLOCKSIZE))
        return not any(file.read())


def _stem_and_extension(name: str) -> tuple[str, str]:
    """a/b.left.jpg -> (a/b, jpg): as in WebDataset, the stem ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extensions = file.partition(".")
    return f"{folder}{slash}{stem}", extensions.rpartition(".")[2].lower()
