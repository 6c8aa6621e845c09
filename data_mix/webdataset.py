"""WebDataset shards: tar files in which an image and its caption lie side by side under one stem.

The members are listed once when the source is opened; a sample is then read at its offset. Nothing is ever
extracted, so a member called ../x or a link is just a name. A shard that cannot be read, then or later, is tried again
and set aside: later its samples raise BadSample, and whoever reads replaces and counts them.
"""

import contextlib
import functools
import json
import logging
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from data_mix.own_images import OwnImages, caption_field
from data_mix.samples import BadSample, Split
from data_mix.set_aside import DamagedFile
from data_mix.splits import choose_rows
from data_mix.tables import find_files, short_names
from um3.core.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json", "cls")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_CAPTION_BYTES = 2**20


class Member(NamedTuple):
    """Where the bytes of a file lie in a shard."""

    offset: int
    size: int


class TarSample(NamedTuple):
    """One image of a shard with the place of its caption, of which `json` tells the format."""

    shard: int
    stem: str
    image: Member
    caption: Member | None
    is_json: bool


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
        samples: list[TarSample] = []
        for number, shard in enumerate(self._shards):
            with contextlib.suppress(BadSample):
                samples += self.set_aside.read(
                    shard,
                    functools.partial(_samples_of, shard, number=number, where=where, column=caption_column),
                )
        if not samples and self.set_aside.reasons:
            raise UserError(next(iter(self.set_aside.reasons.values())))
        if not samples:
            wanted = "/".join(IMAGE_EXTENSIONS)
            raise UserError(f"{where}: no image ({wanted}) in {len(self._shards)} tar files; is it WebDataset?")
        rows = choose_rows(
            num_rows=len(samples),
            labels=None,
            key_of=lambda row: self._name_of(samples[row]),
            split=split,
            val_fraction=val_fraction,
            where=where,
        )
        self._samples = [samples[row] for row in rows]

    def _name_of(self, sample: TarSample) -> str:
        return f"{self._names[sample.shard]}#{sample.stem}"

    def __len__(self) -> int:
        return len(self._samples)

    def _key(self, index: int) -> str:
        return self._name_of(self._samples[index])

    def _image(self, index: int) -> bytes:
        return self._read(index, self._samples[index].image, limit=MAX_IMAGE_BYTES)

    def _captions(self, index: int) -> Any:
        sample = self._samples[index]
        if sample.caption is None:
            raise BadSample("no caption", detail=self._key(index))
        data = self._read(index, sample.caption, limit=MAX_CAPTION_BYTES)
        try:
            if not sample.is_json:
                return data.decode("utf-8-sig").splitlines()
            record, column = json.loads(data), self._caption_column
            return record.get(column) if column and isinstance(record, dict) else caption_field(record)
        except (ValueError, RecursionError) as error:  # also what is not UTF-8
            raise BadSample("unreadable caption", detail=f"{self._key(index)}: {error}") from None

    def _read(self, index: int, member: Member, *, limit: int) -> bytes:
        if member.size > limit:
            raise BadSample("too large", detail=f"{self._key(index)}: {member.size:,} bytes, {limit:,} allowed")
        shard = self._shards[self._samples[index].shard]
        data = self.set_aside.read(shard, functools.partial(_bytes_at, shard, member=member))
        if len(data) < member.size:
            raise BadSample("truncated", detail=self._key(index))
        return data


def _bytes_at(shard: Path, *, member: Member) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _samples_of(shard: Path, *, number: int, where: str, column: str) -> list[TarSample]:
    """The samples of one shard in the order of their images."""
    found: dict[str, dict[str, Member]] = {}
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
        logger.warning("%s: '%s' is damaged (%s); only what lies before is used", where, shard, error)
        return _complete(found, number=number, column=column)
    if found and not _has_end_mark(shard):
        # tarfile takes a file cut within a header for a complete one.
        logger.warning("%s: '%s' is damaged (cut off); only what lies before is used", where, shard)
    return _complete(found, number=number, column=column)


def _complete(found: dict[str, dict[str, Member]], *, number: int, column: str) -> list[TarSample]:
    """Members by stem and extension as samples; a stem without an image is none."""
    captions = ("txt", "json") if not column else (column,) if column in ("txt", "cls") else ("json",)
    samples = []
    for stem, members in found.items():
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is not None:
            extension = next((extension for extension in captions if extension in members), "")
            samples.append(TarSample(number, stem, image, members.get(extension), is_json=extension == "json"))
    return samples


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
