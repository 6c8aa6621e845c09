"""WebDataset shards: tar files in which an image and its captions lie side by side under one stem.

The members are listed when the source is opened (`data_mix.sources.file_index`), and a sample is read at its offset.
Nothing is extracted, so a member called ../x is only a name.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import DAMAGED, BadFiles, DamagedFile
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.file_index import FileIndex
from data_mix.sources.images import UNREADABLE_CAPTION, ImageReader, caption_field
from um3.core.errors import UserError
from um3.core.files import parse_json
from um3.core.images import MAX_FILE_BYTES

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGES = frozenset(IMAGE_EXTENSIONS)
EXTENSIONS = IMAGES | {"txt", "json", "cls"}
MAX_CAPTION_BYTES = 2**20
# Where an image and its caption lie in their shard; the places of a caption are null without one.
PLACES = ("image_offset", "image_size", "caption_offset", "caption_size")
SCHEMA = pa.schema([("stem", pa.large_binary()), *((name, pa.int64()) for name in PLACES), ("is_json", pa.bool_())])
HIDDEN = re.compile(r"(?:^|/)\.(?!\.?(?:/|$))")

Place = tuple[int, int]  # offset and size
Places = dict[str, dict[str, Place]]  # by stem and extension


class WebDatasetImages(ImageReader):
    """The images of all shards at a path.

    `caption_column` "txt" takes the captions from stem.txt (one a line), "cls" from stem.cls, another name from that
    field of stem.json; empty takes stem.txt if it exists, else the caption field of stem.json.

    The stem of a member ends at its last dot. An image without captions of that stem takes those of the stem that ends
    at the first dot, as in WebDataset (z.left.jpg, z.txt); of several such images only the first is a sample.
    """

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        self._column = "" if config.captions else config.caption_column
        rows = FileIndex(config, kind="webdataset", variant=self._column, split=split, list_file=self._list_shard)
        super().__init__(config, size=size, rows=rows)
        self._read_captions(rows.all_keys(separator="/"), rows.rows)

    def _image(self, index: int) -> bytes:
        return self._read(index, "image", limit=MAX_FILE_BYTES)[0]

    def _captions(self, index: int) -> Any:
        data, is_json = self._read(index, "caption", limit=MAX_CAPTION_BYTES)
        if not is_json:
            return data
        try:
            record = parse_json(data, where=self._key(index), kind=dict)
        except UserError as error:
            raise BadSample(UNREADABLE_CAPTION, detail=str(error)) from None
        return record.get(self._column) if self._column else caption_field(record)

    def _read(self, index: int, member: str, *, limit: int) -> tuple[bytes, bool]:
        """The bytes of a sample's "image" or "caption", and whether the caption is JSON."""
        shard, offset, size, is_json = self.rows.entry(index, f"{member}_offset", f"{member}_size", "is_json")
        if offset is None:
            raise BadSample(f"no {member}", detail=self._key(index))
        if size > limit:
            raise BadSample("too large", detail=f"{self._key(index)}: {size:,} bytes, {limit:,} allowed")
        data = self.bad_files.read_part(shard, offset, size)
        if len(data) < size:
            raise BadSample("truncated", detail=self._key(index))
        return data, is_json

    def _list_shard(self, shard: Path, bad_files: BadFiles) -> pa.RecordBatch:
        """The samples of one shard in the order of their stems."""
        places: Places = {}
        count = bad_files.count
        try:
            for member in _members(shard):
                stem, _, extension = member.name.rpartition(".")
                if (extension := extension.lower()) not in EXTENSIONS or HIDDEN.search(member.name):
                    continue
                place: Place | None = (member.offset_data, member.size)
                if member.islnk():
                    linked, _, linked_extension = member.linkname.rpartition(".")
                    place = places.get(linked, {}).get(linked_extension.lower())
                elif not member.isreg() or member.issparse():  # a sparse member is not stored in one piece
                    place = None
                if place is None:
                    count("link, sparse or special member", f"{shard}#{member.name}")
                    continue
                if extension in places.setdefault(stem, {}):
                    count("replaced by a later member of the same name", f"{shard}#{member.name}")
                places[stem][extension] = place
        except (tarfile.TarError, EOFError, ValueError) as error:
            if not places or not bad_files.skip:
                problem = "damaged" if places else "not an uncompressed tar file"
                raise DamagedFile(f"'{shard}' is {problem} ({error}); unpack .tar.gz first") from None
            count(DAMAGED, f"{shard} ({error})")
        return self._entries(shard, places, count=count)

    def _entries(self, shard: Path, places: Places, *, count: Callable[..., None]) -> pa.RecordBatch:
        """Index entries (see SCHEMA) of the stems that have an image."""
        captions = {"": ("txt", "json"), "txt": ("txt",), "cls": ("cls",)}.get(self._column, ("json",))
        samples = {stem: places.get(_stem_to_first_dot(stem), found) for stem, found in places.items()}
        for stem, found in places.items():
            if not found.keys() & IMAGES and samples[stem].keys() & IMAGES:  # z.png takes z.a.txt, as in WebDataset
                samples[stem] |= {extension: found[extension] for extension in found.keys() - samples[stem].keys()}
        entries, used = [], set[int]()
        for stem, found in places.items():
            if not (images := [extension for extension in IMAGE_EXTENSIONS if extension in found]):
                continue
            if len(images) > 1:
                count("second image of one name", f"{shard}#{stem}")
            if not found.keys() - IMAGES and samples[stem].keys() - IMAGES:
                if id(samples[stem]) in used or samples[stem].keys() & IMAGES:
                    count("second image of one sample", f"{shard}#{stem}")
                    continue
                used.add(id(samples[stem]))
                found, stem = found | samples[stem], _stem_to_first_dot(stem)
            caption = next((extension for extension in captions if extension in found), "")
            name = stem.encode("utf-8", "surrogateescape")  # a name in a tar may be any bytes
            entries.append((name, *found[images[0]], *found.get(caption, (None, None)), caption == "json"))
        for stem, found in places.items():
            if not samples[stem].keys() & IMAGES and not found.keys() & IMAGES and id(found) not in used:
                count("captions without an image", f"{shard}#{stem}")
        rows = [dict(zip(SCHEMA.names, entry, strict=True)) for entry in entries]
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, and of others that were joined to it; TarError where it is damaged or cut off."""
    with shard.open("rb") as file:
        start, end = 0, shard.stat().st_size
        while start < end:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from tar
                file.seek(tar.offset)
            # tarfile takes a file that was cut within a header, and a header that is damaged, for the end.
            if any(block := file.read(tarfile.BLOCKSIZE)) or not block:
                raise tarfile.ReadError("cut off")
            start = end
            while zeros := file.read(2**20):
                if rest := zeros.lstrip(b"\0"):
                    start = (file.tell() - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
                    break
        if not end:
            raise tarfile.ReadError("empty file")


def _stem_to_first_dot(stem: str) -> str:
    """a/b.left -> a/b: a sample of WebDataset, which has several files that may differ in more than their suffix."""
    return re.sub(r"\.[^/]*\Z", "", stem)
