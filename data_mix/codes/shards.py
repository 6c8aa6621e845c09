"""Code shards: images as the visual tokenizer's codes, on disk.

A shard is a parquet file with the columns key, codes (list<uint32>, one code per patch), height and width (in
patches), captions (list<string>) and source. Its schema metadata says which tokenizer made it. Readers know from
the footers what there is, and map an uncompressed copy of each shard into memory (in `.arrow/` beside it) when one
of its images is first asked for: so thousands of shards open at once, all the processes of a machine share one copy,
and 18M images of 256 codes cost page cache instead of 30 GB each.

Shape legend: N = patches of one image, B = images of a shard.
"""

import bisect
import contextlib
import errno
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import DamagedFile, SetAside
from um3.core.errors import UserError
from um3.core.files import atomic_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAX_BITS = 32  # codes are stored as uint32
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "codes": pa.list_(pa.uint32()),
        "height": pa.int32(),
        "width": pa.int32(),
        "captions": pa.list_(pa.string()),
        "source": pa.string(),
    }
)


@dataclass(frozen=True)
class ShardHeader:
    """What the schema metadata of a shard says, every value as text.

    The first three are the contract between rooms. The others let an interrupted encoding go on: which part
    of what plan this shard is, and how many samples of that part could not be used, by reason.
    """

    fingerprint: str
    bits: int
    image_size: int
    split: str = ""
    source: str = ""
    shard: int = 0
    num_shards: int = 1
    plan: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        values = asdict(self) | {"skipped": json.dumps(dict(self.skipped), sort_keys=True)}
        return {"format_version": str(FORMAT_VERSION)} | {key: str(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes]) -> Self:
        """Raises KeyError or ValueError where the metadata is not that of a code shard."""
        values = {key.decode(): value.decode() for key, value in metadata.items()}
        if int(values["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"format version {values['format_version']}, this program reads {FORMAT_VERSION}")
        return cls(
            fingerprint=values["fingerprint"],
            bits=int(values["bits"]),
            image_size=int(values["image_size"]),
            split=values.get("split", ""),
            source=values.get("source", ""),
            shard=int(values.get("shard", "0")),
            num_shards=int(values.get("num_shards", "1")),
            plan=values.get("plan", ""),
            skipped=json.loads(values.get("skipped", "{}")),
        )


class CodedSample(NamedTuple):
    """One image as codes_N (int64), with all its captions, the fullest first."""

    key: str
    codes_N: torch.Tensor
    captions: tuple[str, ...]


def shard_path(folder: str | Path, *, split: str, source: str, shard: int) -> Path:
    """Where a shard lies: FOLDER/SPLIT-SOURCE-00000.parquet."""
    return Path(folder) / f"{split}-{source}-{shard:05d}.parquet"


def write_shard(
    path: Path, *, header: ShardHeader, keys: Sequence[str], codes_BN: np.ndarray, captions: Sequence[Sequence[str]]
) -> None:
    """Write one shard atomically; the images are square, so N is a square number.

    Raises:
        ValueError: codes of more than 32 bits, or outside the header's bits.
    """
    if not 1 <= header.bits <= MAX_BITS:
        raise ValueError(f"codes of {header.bits} bits do not fit the shards' uint32")
    if codes_BN.size and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < 2**header.bits:
        raise ValueError(f"codes {codes_BN.min()}..{codes_BN.max()} are outside {header.bits} bits")
    num_images, num_patches = codes_BN.shape
    side = round(num_patches**0.5)
    offsets = np.arange(num_images + 1, dtype=np.int32) * num_patches
    columns = {
        "key": pa.array(keys, pa.string()),
        "codes": pa.ListArray.from_arrays(offsets, pa.array(codes_BN.astype(np.uint32).reshape(-1))),
        "height": pa.array(np.full(num_images, side, dtype=np.int32)),
        "width": pa.array(np.full(num_images, num_patches // side, dtype=np.int32)),
        "captions": pa.array([list(texts) for texts in captions], pa.list_(pa.string())),
        "source": pa.array([header.source] * num_images, pa.string()),
    }
    table = pa.table(columns, schema=SCHEMA.with_metadata(header.to_metadata()))
    with atomic_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


class Footer(NamedTuple):
    """What the end of a shard tells without its columns being read."""

    header: ShardHeader
    num_images: int


def read_header(path: Path) -> ShardHeader:
    """The header of a shard; errors are those of `read_footer`."""
    return read_footer(path).header


def read_footer(path: Path) -> Footer:
    """The header of a shard and how many images it holds.

    Raises:
        UserError: the file is damaged or is no code shard.
    """
    with _damage_named(path):
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    try:
        header = ShardHeader.from_metadata(schema.metadata or {})
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a code shard ({error}); remove it, or run make codes to make it anew") from None
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        raise UserError(f"{path} is not a code shard (no column {missing[0]!r}); remove it, or run make codes")
    return Footer(header=header, num_images=metadata.num_rows)


def shard_footers(where: str | Path) -> dict[Path, Footer]:
    """Footers of the shards in a folder or matching a glob pattern, in the order of their names."""
    where = Path(where)
    folder, pattern = (where.parent, where.name) if any(c in where.name for c in "*?[") else (where, "*.parquet")
    return {path: read_footer(path) for path in sorted(folder.glob(pattern)) if path.suffix == ".parquet"}


class CodeShards:
    """All coded images of one split (of one source, if given), by index.

    That the shards are all there and of one tokenizer is checked at once. One that turns out not to be readable is
    tried again and then set aside (`set_aside`), as long as they are no more than half: its images stay in the count
    and raise BadSample.
    """

    def __init__(
        self,
        where: str | Path,
        *,
        split: Split,
        source: str | None = None,
        expected_fingerprint: str | None = None,
        footers: Mapping[Path, Footer] | None = None,
    ) -> None:
        """`where`: a folder of shards or a glob pattern. `footers`: those of its shards, where they are known already.

        Raises:
            UserError: no shards or some missing, ones with a damaged footer, of another tokenizer or of several,
                or more than half that cannot be read.
        """
        ours = {
            path: footer
            for path, footer in (shard_footers(where) if footers is None else footers).items()
            if footer.header.split == split and source in (None, footer.header.source)
        }
        headers = {path: footer.header for path, footer in ours.items()}
        what = f"{split} codes of '{source}'" if source else f"{split} codes"
        if not headers:
            raise UserError(f"there are no {what} in {where}; run make codes first")
        _check_complete(headers)
        _check_one_tokenizer(headers, expected_fingerprint=expected_fingerprint)
        first = next(iter(headers.values()))
        self.name = source or split
        self.fingerprint, self.bits, self.image_size = first.fingerprint, first.bits, first.image_size
        self.set_aside = SetAside(self.name)
        self._paths = [path for path, footer in ours.items() if footer.num_images]
        self._ends = list(itertools.accumulate(ours[path].num_images for path in self._paths))
        self._mapped: dict[int, _MappedShard] = {}
        if not self._ends:
            raise UserError(f"the {what} in {where} hold no image; see summary.json there for what was skipped and why")
        self.num_patches = self._first_shard().num_patches

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> CodedSample:
        """Coded image `index`.

        Raises:
            BadSample: its shard is set aside.
            UserError: so is more than half of them.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"coded image {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shard(number)
        sample = shard.sample(index - self._ends[number] + len(shard))
        if int(sample.codes_N.max()) >> self.bits:
            raise UserError(f"{shard.path} holds a code of more than {self.bits} bits; run make codes to make it anew")
        return sample

    def _first_shard(self) -> "_MappedShard":
        """The first that can be read."""
        for number in range(len(self._paths)):
            with contextlib.suppress(BadSample):
                return self._shard(number)
        raise AssertionError("_shard raises for the last")

    def _shard(self, number: int) -> "_MappedShard":
        if number not in self._mapped:
            path = self._paths[number]
            try:
                self._mapped[number] = self.set_aside.read(path, lambda: self._map(number))
            except BadSample:
                lost = len(self.set_aside.reasons)
                if lost <= len(self._paths) / 2:
                    raise
                raise UserError(
                    f"{lost} of the {len(self._paths)} shards of '{self.name}' cannot be read, more than half; "
                    f"the last: {self.set_aside.reasons[path]}"
                ) from None
        return self._mapped[number]

    def _map(self, number: int) -> "_MappedShard":
        """Map a shard into memory; DamagedFile where it is not what its footer said or unlike the others."""
        shard = _MappedShard(self._paths[number])
        num_images = self._ends[number] - (self._ends[number - 1] if number else 0)
        expected = (num_images, next(iter(self._mapped.values()), shard).num_patches)
        if (len(shard), shard.num_patches) != expected:
            raise DamagedFile(
                f"{shard.path} holds {len(shard)} images of {shard.num_patches} patches, not {expected[0]} of "
                f"{expected[1]}; run make codes to make it anew"
            )
        return shard


def open_code_sources(
    where: str | Path, *, split: Split, expected_fingerprint: str | None = None
) -> dict[str, CodeShards]:
    """The coded images of a folder, by source; the errors are those of `CodeShards`."""
    footers = shard_footers(where)
    names = sorted({footer.header.source for footer in footers.values() if footer.header.split == split})
    if not names:
        raise UserError(f"there are no {split} codes in {where}; run make codes first")
    return {
        name: CodeShards(where, split=split, source=name, expected_fingerprint=expected_fingerprint, footers=footers)
        for name in names
    }


class _MappedShard:
    """One shard in mapped memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table = _map_table(path)
        self.keys, self.captions = table["key"], table["captions"]
        with _damage_named(path):
            codes = table["codes"].chunk(0) if table["codes"].num_chunks == 1 else table["codes"].combine_chunks()
            grids = set(zip(table["height"].unique().to_pylist(), table["width"].unique().to_pylist(), strict=True))
            self.num_patches = math.prod(next(iter(grids), (0, 0)))
            if len(grids) > 1 or len(codes.flatten()) != len(codes) * self.num_patches:
                raise pa.ArrowInvalid(f"{len(codes.flatten())} codes in {len(codes)} images of {grids} patches")
            self.codes_BN = codes.flatten().to_numpy(zero_copy_only=True).reshape(len(codes), self.num_patches)

    def __len__(self) -> int:
        return len(self.codes_BN)

    def sample(self, row: int) -> CodedSample:
        codes_N = torch.from_numpy(self.codes_BN[row].astype(np.int64))
        return CodedSample(self.keys[row].as_py(), codes_N, tuple(self.captions[row].as_py()))


def _map_table(path: Path) -> pa.Table:
    """The shard's columns in mapped memory; plain memory where the folder cannot be written to."""
    stat = path.stat()
    mapped = path.parent / ".arrow" / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.arrow"
    try:
        if not mapped.exists():
            _write_mapped(path, mapped)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        logger.warning("%s cannot be written to: its shards are read into the memory of every process", path.parent)
        return _read_parquet(path)
    with _damage_named(mapped):
        return pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()


def _write_mapped(path: Path, mapped: Path) -> None:
    table = _read_parquet(path).combine_chunks()
    mapped.parent.mkdir(exist_ok=True)
    for outdated in mapped.parent.glob(f"{path.stem}-*.arrow"):
        outdated.unlink(missing_ok=True)
    # Several processes may come here at once: each writes a file of its own, the last one to finish stays.
    partial = mapped.with_name(f"{mapped.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        with pa.ipc.new_file(str(partial), table.schema) as writer:
            writer.write_table(table)
        os.replace(partial, mapped)
    finally:
        partial.unlink(missing_ok=True)


def _read_parquet(path: Path) -> pa.Table:
    with _damage_named(path):
        return pq.read_table(path, columns=SCHEMA.names, partitioning=None)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedFile(f"{path} does not exist; run make codes first") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split("\n")[0].split())
        raise DamagedFile(f"{path} is damaged ({reason}); delete it and run make codes") from None


def _check_complete(headers: Mapping[Path, ShardHeader]) -> None:
    """Every source has all the shards of one and the same plan."""
    by_source: dict[str, list[tuple[Path, ShardHeader]]] = {}
    for path, header in headers.items():
        by_source.setdefault(header.source, []).append((path, header))
    for source, shards in by_source.items():
        path, first = shards[0]
        numbers = sorted(header.shard for _, header in shards)
        same_plan = all((h.plan, h.num_shards) == (first.plan, first.num_shards) for _, h in shards)
        if not same_plan or numbers != list(range(first.num_shards)):
            raise UserError(
                f"{path.parent}: {len(shards)} {first.split} shards of '{source}' do not make up the "
                f"{first.num_shards} of one encoding; run make codes to finish them"
            )


def _check_one_tokenizer(headers: Mapping[Path, ShardHeader], *, expected_fingerprint: str | None) -> None:
    first_path, first = next(iter(headers.items()))
    for path, header in headers.items():
        if expected_fingerprint is not None and header.fingerprint != expected_fingerprint:
            raise UserError(
                f"{path} was made by the tokenizer with fingerprint {header.fingerprint}, this run uses "
                f"{expected_fingerprint}; run make codes to encode the images anew"
            )
        for name in ("fingerprint", "bits", "image_size"):
            ours, theirs = getattr(first, name), getattr(header, name)
            if ours != theirs:
                raise UserError(
                    f"{first_path} and {path} disagree: {name} {ours} and {theirs}; run make codes to make them anew"
                )
