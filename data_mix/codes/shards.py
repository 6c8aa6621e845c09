"""Code shards: images as codes of the visual tokenizer, on disk.

A shard is an Arrow IPC file of one record batch with the columns `key` (string), `codes` (one uint32 per patch) and
`captions` (list of strings). Its schema metadata holds a `ShardHeader` as JSON, and checksums of it and of the columns.
Readers check the headers of all shards at once, and map and check a shard when one of its images is first read. So
thousands of shards open at once, all processes of a machine share the page cache, and no copy of the codes is made.

Shape legend: N = patches of one image, B = images of a shard.
"""

import bisect
import contextlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch

from data_mix.arrow_files import is_cut
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles, DamagedFile
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash
from um3.core.text import valid_text

MAX_BITS = 32  # codes are stored as uint32
METADATA_KEY = b"code_shard_3"  # ends with the version of the format
CHECKSUM_KEY = b"code_shard_crc32"
COLUMNS = ("key", "codes", "captions")


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard.

    fingerprint, bits, image_size: of the visual tokenizer that made the codes.
    plan: hash of everything that decides which samples the shards of a source hold, to resume an encoding.
    num_patches, num_images, crc32: shape of the codes and CRC-32 of the columns; `write_shard` fills them in.
    skipped: number of samples that could not be used, by reason.
    """

    fingerprint: str
    bits: int
    image_size: int
    split: str = "train"
    source: str = ""
    shard: int = 0
    num_shards: int = 1
    plan: str = ""
    num_patches: int = 0
    num_images: int = 0
    crc32: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError for values that no shard can have."""
        numbers = (self.image_size, self.shard, self.num_shards, self.num_patches, self.num_images, self.crc32)
        if not (type(self.bits) is int and 1 <= self.bits <= MAX_BITS):
            raise ValueError(f"codes of {self.bits} bits; code shards hold 1 to {MAX_BITS}")
        if not all(type(number) is int and 0 <= number < 2**32 for number in (*numbers, *self.skipped.values())):
            raise ValueError(f"one of {numbers} or {self.skipped} is not a count")
        if self.split not in get_args(Split) or not isinstance(self.source, str):
            raise ValueError(f"{self.split}-{self.source} is not a split and a source")


def columns_crc32(columns: Iterable[pa.Array]) -> int:
    """CRC-32 of the buffers of whole columns (no slices), which an Arrow file keeps as they are (about 1 GB/s)."""
    crc32 = 0
    for buffer in (buffer for column in columns for buffer in column.buffers() if buffer is not None):
        crc32 = zlib.crc32(buffer, crc32)
    return crc32


class CodedSample(NamedTuple):
    """One image as codes_N (int64), with all its captions, the most detailed first."""

    key: str
    codes_N: torch.Tensor
    captions: tuple[str, ...]

    def captions_in(self, folder: str) -> tuple[str, ...]:
        """The captions; UserError without one, which names the `folder` of the codes."""
        if not self.captions[0]:
            raise UserError(
                f"the image {self.key} in {folder} has no caption; name the sources that have captions in "
                "data.image_weights"
            )
        return self.captions


def shard_path(folder: str | Path, *, split: str, source: str, shard: int) -> Path:
    """The path of a shard: FOLDER/SPLIT-SOURCE-00000.arrow."""
    return Path(folder) / f"{split}-{source}-{shard:05d}.arrow"


def write_shard(
    path: Path, *, header: ShardHeader, keys: Sequence[str], codes_BN: np.ndarray, captions: Sequence[Sequence[str]]
) -> None:
    """Write one shard atomically; the same arguments give the same bytes. ValueError for codes outside the bits."""
    if codes_BN.size and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < 2**header.bits:
        raise ValueError(f"codes {codes_BN.min()}..{codes_BN.max()} are outside {header.bits} bits")
    num_images, num_patches = codes_BN.shape
    values = pa.array(codes_BN.astype(np.uint32).reshape(-1))
    texts = [[valid_text(text) for text in texts] for texts in captions]
    columns = [
        pa.array(map(valid_text, keys), pa.string()),
        pa.FixedSizeListArray.from_arrays(values, num_patches),
        pa.array(texts, pa.list_(pa.string())),
    ]
    header = replace(header, num_images=num_images, num_patches=num_patches, crc32=columns_crc32(columns))
    text = json.dumps(asdict(header), sort_keys=True).encode()
    metadata = {METADATA_KEY: text, CHECKSUM_KEY: str(zlib.crc32(text))}
    batch = pa.RecordBatch.from_arrays(columns, names=COLUMNS, metadata=metadata)
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)


def read_header(path: Path) -> ShardHeader:
    """The header of a shard; UserError if the file is damaged or is not a code shard."""
    with _damage_named(path), pa.OSFile(str(path)) as file:
        metadata = pa.ipc.open_file(file).schema.metadata or {}
    text = metadata.get(METADATA_KEY, b"")
    try:
        if metadata.get(CHECKSUM_KEY) == str(zlib.crc32(text)).encode():
            return ShardHeader(**json.loads(text))
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    raise DamagedFile(f"{path} is not a code shard of this version, or is damaged; delete it and run make codes")


class CodeShards:
    """All coded images of one source and split, by index.

    A shard that cannot be read is tried again and then skipped: its images still count, and raise BadSample. More than
    half of the shards must be readable. `bad_files` holds the skipped shards with the reason, `digest` is a hash of
    the content of all shards.
    """

    def __init__(self, name: str, headers: Mapping[Path, ShardHeader]) -> None:
        """`headers`: those of all shards; `open_code_sources` reads and checks them."""
        where, first = next(iter(headers.items()))
        self.name = name
        self.bits, self.num_patches = first.bits, first.num_patches
        self.fingerprint, self.image_size = first.fingerprint, first.image_size
        self.digest = short_hash([header.crc32 for header in headers.values()])
        self.bad_files = BadFiles(name)
        self._headers = {path: header for path, header in headers.items() if header.num_images}
        self._paths = list(self._headers)
        self._ends = list(itertools.accumulate(header.num_images for header in self._headers.values()))
        self._mapped: dict[Path, tuple[int, pa.RecordBatch]] = {}
        if not self._ends:
            summary = where.parent / "summary.json"
            raise UserError(f"the {first.split} codes of '{name}' hold no image; see 'skipped' in {summary}")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> CodedSample:
        """Coded image `index`; BadSample if its shard cannot be read, UserError if more than half of them cannot."""
        if not 0 <= index < len(self):
            raise IndexError(f"coded image {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shard(self._paths[number])
        row = index - self._ends[number] + len(shard)
        key, codes, captions = (column[row] for column in shard.columns)
        codes_N = torch.from_numpy(codes.values.to_numpy().astype(np.int64))
        return CodedSample(key.as_py(), codes_N, tuple(captions.as_py()))

    def each_key(self) -> Iterator[tuple[int, str]]:
        """(index, key) of every image whose shard can be read."""
        for path, end in zip(self._paths, self._ends, strict=True):
            with contextlib.suppress(BadSample):
                shard = self._shard(path)
                yield from enumerate(shard.column("key").to_pylist(), start=end - len(shard))

    def _shard(self, path: Path) -> pa.RecordBatch:
        if path in self._mapped and is_cut(path, self._mapped[path][0]):
            del self._mapped[path]
        if path not in self._mapped:
            try:
                self._mapped[path] = self.bad_files.read(path, lambda: map_shard(path, header=self._headers[path]))
            except BadSample as error:
                num_bad, num_shards = len(self.bad_files.reasons), len(self._paths)
                if num_bad <= num_shards / 2:
                    raise
                shards = f"{num_bad} of the {num_shards} shards of '{self.name}'"
                raise UserError(f"{shards} cannot be read, more than half; the last: {error}") from None
        return self._mapped[path][1]


def shard_headers(folder: str | Path, *, split: Split) -> dict[Path, ShardHeader]:
    """The headers of a folder's shards of one split by path; UserError if there are none, or one is damaged."""
    headers = {path: read_header(path) for path in sorted(Path(folder).glob(f"{split}-*.arrow"))}
    for path, header in headers.items():
        expected = shard_path(folder, split=header.split, source=header.source, shard=header.shard)
        if path != expected:
            raise UserError(f"{path} is a copy of {expected.name}; delete it or restore its name")
    if not headers:
        raise UserError(f"there are no {split} codes in {folder}; run make codes first")
    return headers


def open_code_sources(
    folder: str | Path, *, split: Split, expected_fingerprint: str | None = None
) -> dict[str, CodeShards]:
    """The coded images of a folder by source, in the order of their names.

    UserError for shards that are absent, damaged, without images, or not all of one tokenizer, the expected one.
    """
    headers = shard_headers(folder, split=split)
    path, first = next(iter(headers.items()))
    if expected_fingerprint not in (None, first.fingerprint):
        from tokenizer.images import external_target  # seconds, which reading shards should not spend

        remedy = "run make codes to encode the images again"
        if target := external_target(first.fingerprint):
            remedy += f", or make llamagen with external_tokenizer={target}"
        raise UserError(
            f"{path} was made by the tokenizer with fingerprint {first.fingerprint}, this run uses "
            f"{expected_fingerprint}; {remedy}"
        )
    for other, header in headers.items():
        for name in ("fingerprint", "bits", "image_size", "num_patches"):
            if getattr(header, name) != getattr(first, name):
                values = f"{getattr(first, name)} and {getattr(header, name)}"
                raise UserError(f"{path} and {other} differ in {name}: {values}; run make codes to encode them again")
    sources: dict[str, dict[Path, ShardHeader]] = {}
    for path, header in headers.items():
        sources.setdefault(header.source, {})[path] = header
    for source, shards in sources.items():
        num_shards = next(iter(shards.values())).num_shards
        if len({(header.plan, header.num_shards) for header in shards.values()}) > 1 or len(shards) != num_shards:
            found = f"{len(shards)} {split} shards of {num_shards}"
            raise UserError(f"{folder}: the encoding of '{source}' is incomplete, {found}; run make codes to finish it")
    return {source: CodeShards(source, sources[source]) for source in sorted(sources)}


def map_shard(path: Path, *, header: ShardHeader) -> tuple[int, pa.RecordBatch]:
    """The size of a shard in bytes, and its columns in mapped memory.

    DamagedFile if its content is invalid, or changed since its `header` was read.
    """
    if read_header(path) != header:
        raise DamagedFile(f"{path} changed since this process opened it; run make codes, then start again")
    with _damage_named(path), pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
        # Reads keys and captions, so that a damaged offset is an error here and not a crash later.
        batch.validate(full=True)
        codes = pa.list_(pa.uint32(), header.num_patches)
        if (len(batch), tuple(batch.schema.names), batch.schema.types[1]) != (header.num_images, COLUMNS, codes):
            raise pa.ArrowInvalid("its columns are not those of its header")
        if columns_crc32(batch.columns) != header.crc32:
            raise pa.ArrowInvalid("its content does not have the checksum in its header")
        return file.size(), batch


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn errors about a file's content into DamagedFile; errors of the system pass."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split("\n")[0].split())
        raise DamagedFile(f"{path} is damaged ({reason}); delete it and run make codes") from None
