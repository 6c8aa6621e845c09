"""Code shards: images as codes of the visual tokenizer, on disk.

A shard is an Arrow IPC file of one record batch with the columns `key` (string), `codes` (one uint32 per patch) and
`captions` (list of strings). Its schema metadata holds a `ShardHeader` as JSON. Readers check the headers of all shards
at once and map a shard into memory when one of its images is first read. So thousands of shards open at once, all
processes of a machine share the page cache, and no copy of the codes is made.

Shape legend: N = patches of one image, B = images of a shard.
"""

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles, DamagedFile
from um3.core.errors import UserError
from um3.core.files import atomic_file

MAX_BITS = 32  # codes are stored as uint32
METADATA_KEY = b"code_shard_2"  # ends with the version of the format
COLUMNS = ("key", "codes", "captions")


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard.

    fingerprint, bits, image_size: of the visual tokenizer that made the codes.
    num_patches, num_images: the shape of the codes; `write_shard` fills them in.
    plan: hash of everything that decides which samples the shards of a source hold, to resume an encoding.
    skipped: number of samples that could not be used, by reason.
    """

    fingerprint: str
    bits: int
    image_size: int
    split: str = ""
    source: str = ""
    shard: int = 0
    num_shards: int = 1
    plan: str = ""
    num_patches: int = 0
    num_images: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


class CodedSample(NamedTuple):
    """One image as codes_N (int64), with all its captions, the most detailed first."""

    key: str
    codes_N: torch.Tensor
    captions: tuple[str, ...]


def shard_path(folder: str | Path, *, split: str, source: str, shard: int) -> Path:
    """The path of a shard: FOLDER/SPLIT-SOURCE-00000.arrow."""
    return Path(folder) / f"{split}-{source}-{shard:05d}.arrow"


def write_shard(
    path: Path, *, header: ShardHeader, keys: Sequence[str], codes_BN: np.ndarray, captions: Sequence[Sequence[str]]
) -> None:
    """Write one shard atomically; the same arguments give the same bytes.

    Raises:
        ValueError: codes of more than 32 bits, or outside the header's bits.
    """
    if not 1 <= header.bits <= MAX_BITS:
        raise ValueError(f"codes of {header.bits} bits do not fit the uint32 of code shards")
    if codes_BN.size and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < 2**header.bits:
        raise ValueError(f"codes {codes_BN.min()}..{codes_BN.max()} are outside {header.bits} bits")
    num_images, num_patches = codes_BN.shape
    header = replace(header, num_images=num_images, num_patches=num_patches)
    values = pa.array(codes_BN.astype(np.uint32).reshape(-1))
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(keys, pa.string()),
            pa.FixedSizeListArray.from_arrays(values, num_patches),
            pa.array([list(texts) for texts in captions], pa.list_(pa.string())),
        ],
        names=COLUMNS,
        metadata={METADATA_KEY: json.dumps(asdict(header), sort_keys=True)},
    )
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)


def read_header(path: Path) -> ShardHeader:
    """The header of a shard.

    Raises:
        UserError: the file is damaged or is not a code shard.
    """
    with _damage_named(path), pa.memory_map(str(path)) as file:
        metadata = pa.ipc.open_file(file).schema.metadata or {}
    try:
        return ShardHeader(**json.loads(metadata[METADATA_KEY]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a code shard of this version; delete it and run make codes") from None


class CodeShards:
    """All coded images of one source and split, by index.

    A shard that cannot be read is tried again and then skipped: its images still count, and raise BadSample. More than
    half of the shards must be readable. `bad_files` holds the skipped shards with the reason.
    """

    def __init__(self, name: str, headers: Mapping[Path, ShardHeader]) -> None:
        """`headers`: those of all shards; `open_code_sources` reads and checks them."""
        first = next(iter(headers.values()))
        self.name = name
        self.fingerprint, self.bits, self.image_size = first.fingerprint, first.bits, first.image_size
        self.num_patches = first.num_patches
        self.bad_files = BadFiles(name)
        self._headers = {path: header for path, header in headers.items() if header.num_images}
        self._paths = list(self._headers)
        self._ends = list(itertools.accumulate(header.num_images for header in self._headers.values()))
        self._mapped: dict[Path, _MappedShard] = {}
        if not self._ends:
            where = next(iter(headers)).parent
            raise UserError(f"the {first.split} codes of '{name}' hold no image; see 'skipped' in {where}/summary.json")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> CodedSample:
        """Coded image `index`.

        Raises:
            BadSample: its shard is skipped because it cannot be read.
            UserError: more than half of the shards cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"coded image {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        path = self._paths[number]
        shard = self._shard(path)
        row = index - self._ends[number] + len(shard.codes_BN)
        codes_N = shard.codes_BN[row].astype(np.int64)
        if int(codes_N.max()) >> self.bits:
            raise UserError(f"{path} holds a code of more than {self.bits} bits; delete it and run make codes")
        return CodedSample(shard.keys[row].as_py(), torch.from_numpy(codes_N), tuple(shard.captions[row].as_py()))

    def _shard(self, path: Path) -> "_MappedShard":
        if path not in self._mapped:
            try:
                self._mapped[path] = self.bad_files.read(path, lambda: _map_shard(path, header=self._headers[path]))
            except BadSample:
                num_bad = len(self.bad_files.reasons)
                if num_bad <= len(self._paths) / 2:
                    raise
                raise UserError(
                    f"{num_bad} of the {len(self._paths)} shards of '{self.name}' cannot be read, more than half; "
                    f"the last: {self.bad_files.reasons[path]}"
                ) from None
        return self._mapped[path]


def shard_headers(folder: str | Path, *, split: Split) -> dict[Path, ShardHeader]:
    """The headers of a folder's shards of one split, in the order of their names.

    Raises:
        UserError: there are none, or one of them is damaged.
    """
    headers = {path: read_header(path) for path in sorted(Path(folder).glob("*.arrow"))}
    headers = {path: header for path, header in headers.items() if header.split == split}
    if not headers and any(Path(folder).glob(f"{split}-*.parquet")):
        raise UserError(f"the code shards in {folder} have an old format (.parquet); run make codes to replace them")
    if not headers:
        raise UserError(f"there are no {split} codes in {folder}; run make codes first")
    return headers


def open_code_sources(
    folder: str | Path, *, split: Split, expected_fingerprint: str | None = None
) -> dict[str, CodeShards]:
    """The coded images of a folder by source, in the order of their names.

    Raises:
        UserError: shards that are absent, damaged, without images or made by another tokenizer than the others or
            than `expected_fingerprint`.
    """
    headers = shard_headers(folder, split=split)
    _check_tokenizer(headers, expected_fingerprint=expected_fingerprint)
    sources: dict[str, dict[Path, ShardHeader]] = {}
    for path, header in headers.items():
        sources.setdefault(header.source, {})[path] = header
    for source, shards in sources.items():
        _check_complete(shards, source=source)
    return {source: CodeShards(source, sources[source]) for source in sorted(sources)}


class _MappedShard(NamedTuple):
    """The columns of a shard in mapped memory."""

    keys: pa.StringArray
    captions: pa.ListArray
    codes_BN: np.ndarray


def _map_shard(path: Path, *, header: ShardHeader) -> _MappedShard:
    """Map a shard into memory.

    Raises:
        DamagedFile: its content is invalid, or it changed since its header was read.
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
        codes_BN = batch["codes"].values.to_numpy(zero_copy_only=True).reshape(len(batch), header.num_patches)
        return _MappedShard(batch["key"], batch["captions"], codes_BN)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn errors about a file's content into DamagedFile; errors of the system pass."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split("\n")[0].split())
        raise DamagedFile(f"{path} is damaged ({reason}); delete it and run make codes") from None


def _check_complete(headers: Mapping[Path, ShardHeader], *, source: str) -> None:
    """UserError unless these are all shards of one plan."""
    path, first = next(iter(headers.items()))
    numbers = sorted(header.shard for header in headers.values())
    plans = {(header.plan, header.num_shards) for header in headers.values()}
    if len(plans) > 1 or numbers != list(range(first.num_shards)):
        raise UserError(
            f"{path.parent}: the encoding of '{source}' is incomplete, {len(headers)} {first.split} shards of "
            f"{first.num_shards}; run make codes to finish it"
        )


def _check_tokenizer(headers: Mapping[Path, ShardHeader], *, expected_fingerprint: str | None) -> None:
    """UserError unless one tokenizer, the expected one, made all shards."""
    first_path, first = next(iter(headers.items()))
    if expected_fingerprint not in (None, first.fingerprint):
        raise UserError(
            f"{first_path} was made by the tokenizer with fingerprint {first.fingerprint}, this run uses "
            f"{expected_fingerprint}; run make codes to encode the images again"
        )
    for path, header in headers.items():
        for name in ("fingerprint", "bits", "image_size", "num_patches"):
            if getattr(header, name) != getattr(first, name):
                raise UserError(
                    f"{first_path} and {path} differ in {name}: {getattr(first, name)} and {getattr(header, name)}; "
                    "run make codes to encode the images again"
                )
