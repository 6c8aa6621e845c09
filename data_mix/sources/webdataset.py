"""WebDataset shards: tar files in which an image and its caption lie side by side under one stem.

The members are listed when the source is opened (`data_mix.sources.file_index`); a sample is then read at its offset. Nothing is
ever extracted, so a member called ../x or a link is just a name. A shard that cannot be read, then or later, is tried
again and set aside: later its samples raise BadSample, and whoever reads replaces and counts them.
"""

import functools
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import DamagedFile
from data_mix.sources.file_index import Listing, open_index
from data_mix.sources.image_folder import OwnImages, caption_field
from data_mix.sources.splits import choose_rows
from data_mix.sources.tables import find_files, short_names
from um3.core.errors import UserError
from um3.core.images import MAX_FILE_BYTES

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json", "cls")
MAX_CAPTION_BYTES = 2**20


class Member(NamedTuple):
    """Where the bytes of a file lie in a shard."""

    offset: int
    size: int


class TarSample(NamedTuple):
    """One image of a shard with the place of its caption, None where it has none; `is_json` tells its format."""

    shard: int
    stem: bytes
    image_offset: int
    image_size: int
    caption_offset: int | None
    caption_size: int | None
    is_json: bool


SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "stem": pa.large_binary(),
        "image_offset": pa.int64(),
        "image_size": pa.int64(),
        "caption_offset": pa.int64(),
        "caption_size": pa.int64(),
        "is_json": pa.bool_(),
    }
)
"""Of a table of TarSamples."""


class WebDatasetImages(OwnImages):
    """The images of all shards at a path.

    caption_column: "txt" takes the captions from stem.txt (one a line), "cls" from stem.cls, another name from that
    field of stem.json;
    empty takes stem.txt where there is one, else the caption field of stem.json.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        split: Split,
        size: int,
        val_fraction: float,
        has_captions: bool = True,
        caption_column: str = "",
    ) -> None:
        super().__init__(name=name, size=size, has_captions=has_captions)
        where, self._caption_column = f"source '{name}' ({path})", caption_column
        self._shards = find_files(path, suffix=".tar", source=name)
        self._names = short_names(self._shards, path)
        self._table = open_index(
            self._shards,
            kind=f"webdataset-{caption_column or 'any'}",
            schema=SCHEMA,
            listing=functools.partial(_listing, where=where, column=caption_column),
            set_aside=self.set_aside,
        )
        if not len(self._table) and self.set_aside.reasons:
            raise UserError(next(iter(self.set_aside.reasons.values())))
        if not len(self._table):
            wanted = "/".join(IMAGE_EXTENSIONS)
            raise UserError(f"{where}: no image ({wanted}) in {len(self._shards)} tar files; is it WebDataset?")
        self._rows = choose_rows(
            num_rows=len(self._table),
            labels=None,
            key_of=self._name_of,
            split=split,
            val_fraction=val_fraction,
            where=where,
        )

    def _name_of(self, row: int) -> str:
        shard, stem = (self._table.column(name)[row].as_py() for name in ("shard", "stem"))
        return f"{self._names[shard]}#{stem.decode('utf-8', 'surrogateescape')}"

    def _sample(self, index: int) -> TarSample:
        return TarSample(**self._table.slice(int(self._rows[index]), 1).to_pylist()[0])

    def __len__(self) -> int:
        return len(self._rows)

    def _key(self, index: int) -> str:
        return self._name_of(int(self._rows[index]))

    def _image(self, index: int) -> bytes:
        sample = self._sample(index)
        return self._read(index, sample.shard, Member(sample.image_offset, sample.image_size), limit=MAX_FILE_BYTES)

    def _captions(self, index: int) -> Any:
        sample = self._sample(index)
        if sample.caption_offset is None or sample.caption_size is None:
            raise BadSample("no caption", detail=self._key(index))
        place = Member(sample.caption_offset, sample.caption_size)
        data = self._read(index, sample.shard, place, limit=MAX_CAPTION_BYTES)
        try:
            if not sample.is_json:
                return data.decode("utf-8-sig").splitlines()
            record, column = json.loads(data), self._caption_column
            return record.get(column) if column and isinstance(record, dict) else caption_field(record)
        except (ValueError, RecursionError) as error:  # also what is not UTF-8
            raise BadSample("unreadable caption", detail=f"{self._key(index)}: {error}") from None

    def _read(self, index: int, shard_number: int, member: Member, *, limit: int) -> bytes:
        if member.size > limit:
            raise BadSample("too large", detail=f"{self._key(index)}: {member.size:,} bytes, {limit:,} allowed")
        shard = self._shards[shard_number]
        data = self.set_aside.read(shard, functools.partial(_bytes_at, shard, member=member))
        if len(data) < member.size:
            raise BadSample("truncated", detail=self._key(index))
        return data


def _bytes_at(shard: Path, *, member: Member) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _listing(number: int, shard: Path, *, where: str, column: str) -> Listing:
    """The samples of one shard in the order of their images."""
    found: dict[str, dict[str, Member]] = {}
    damage = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, extension = _stem_and_extension(member.name)
                known = extension in IMAGE_EXTENSIONS or extension in CAPTION_EXTENSIONS
                # Sparse members are not stored in one piece, so an offset does not find them.
                if known and member.isreg() and not member.issparse():
                    found.setdefault(stem, {}).setdefault(extension, Member(member.offset_data, member.size))
    except (tarfile.TarError, EOFError, ValueError) as error:
        if not found:
            reason = f"'{shard}' is no uncompressed tar file ({error}); unpack .tar.gz first"
            raise DamagedFile(f"{where}: {reason}") from None
        damage = str(error)
    if found and not damage and not _has_end_mark(shard):
        damage = "cut off"  # tarfile takes a file cut within a header for a complete one
    if damage:
        logger.warning("%s: '%s' is damaged (%s); only what lies before is used", where, shard, damage)
    samples = [sample._asdict() for sample in _complete(found, number=number, column=column)]
    return Listing(pa.Table.from_pylist(samples, schema=SCHEMA), whole=not damage)


def _complete(found: dict[str, dict[str, Member]], *, number: int, column: str) -> Iterator[TarSample]:
    """Members by stem and extension as samples; a stem without an image is none."""
    captions = ("txt", "json") if not column else (column,) if column in ("txt", "cls") else ("json",)
    for stem, members in found.items():
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is not None:
            extension = next((extension for extension in captions if extension in members), "")
            caption = members.get(extension)
            yield TarSample(
                shard=number,
                stem=stem.encode("utf-8", "surrogateescape"),  # a name in a tar may be any bytes
                image_offset=image.offset,
                image_size=image.size,
                caption_offset=caption.offset if caption else None,
                caption_size=caption.size if caption else None,
                is_json=extension == "json",
            )


def _has_end_mark(shard: Path) -> bool:
    """A whole tar ends in a block of zeros."""
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - tarfile.BLOCKSIZE))
        return not any(file.read())


def _stem_and_extension(name: str) -> tuple[str, str]:
    """a/b.left.jpg -> (a/b, jpg): the stem ends at the first dot of the file name, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, extensions = file.partition(".")
    return f"{folder}{slash}{stem}", extensions.rpartition(".")[2].lower()
