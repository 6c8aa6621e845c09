"""`make codes`: encode every image of the sources with the visual tokenizer and write code shards.

A shard holds the usable ones of a fixed range of a source's samples. So a resumed run keeps the finished shards and
writes the same bytes as one without interruption. No finished shard is deleted before its replacement is written.

Shape legend: B = images of one batch or shard, N = patches of one image.
"""

import contextlib
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from data_mix.codes.shards import MAX_BITS, ShardHeader, read_header, shard_path, write_shard
from data_mix.prefetch import Prefetch
from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.hub_streaming import HubStream, hub_stream
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from um3.core.commands import command_parser, read_config
from um3.core.distributed import device, mixed_precision, resolve_precision, set_up_cpu
from um3.core.errors import UserError
from um3.core.files import folder_lock, read_json, sha256_of, short_hash, write_json
from um3.core.hub import HUB_ID, weight_files, weights_digest
from um3.core.log import setup_logging
from um3.core.progress import Progress
from um3.core.ranges import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from tokenizer.images import ExternalTokenizer, QLIPImages

    CodeMaker = QLIPImages | ExternalTokenizer

logger = logging.getLogger(__name__)

SOURCE_NAME = r"[A-Za-z0-9._-]+"
SHARD_NAME = re.compile(rf"(train|val)-{SOURCE_NAME}-\d{{5}}\.(arrow|parquet)(\.partial)?")  # .parquet: version 1


@dataclass
class EncodeConfig:
    """What to encode, with which tokenizer, and where to.

    visual_tokenizer: folder or hub id.
    external_tokenizer: package.module:function of a tokenizer from elsewhere, in place of visual_tokenizer; it
        returns a `tokenizer.images.ImageTokenizer`.
    limit: number of samples of each source and split, from the first on; 0 for all.
    precision: fp32; bf16-mixed (autocast), which changes a few codes; auto: bf16-mixed where bf16 pays on this machine.
    """

    visual_tokenizer: str = ""
    external_tokenizer: str = ""
    output_dir: str = "codes"
    images: list[ImageSourceConfig] = field(default_factory=list)
    seed: int = 0
    batch_size: PositiveInt = 64
    samples_per_shard: PositiveInt = 4096
    limit: NonNegativeInt = 0
    num_threads: PositiveInt = 1
    precision: Literal["auto", "fp32", "bf16-mixed"] = "fp32"

    def __post_init__(self) -> None:
        names = [source.name for source in self.images]
        for source in self.images:
            if not re.fullmatch(SOURCE_NAME, source.name):
                raise ValueError(f"image source '{source.name}': use letters, digits, '.', '_' and '-' in its name")
            if names.count(source.name) > 1:
                raise ValueError(f"two image sources have the name '{source.name}'; give each its own name")


class ShardJob(NamedTuple):
    """One shard to make of the samples `indices` of `source`, in batches that `Prefetch` reads."""

    path: Path
    header: ShardHeader
    source: ImageSource
    indices: range
    batch_size: int

    def batch(self, step: int) -> tuple[list[Sample], list[str]]:
        """The usable samples of batch `step`, and the reasons why others are skipped."""
        samples, reasons = [], []
        for index in self.indices[step * self.batch_size : (step + 1) * self.batch_size]:
            try:
                samples.append(self.source[index])
            except BadSample as error:
                reasons.append(error.reason)
        return samples, reasons

    def is_finished(self) -> bool:
        """Whether the shard is there, made of the same plan."""
        with contextlib.suppress(FileNotFoundError):
            try:
                return replace(read_header(self.path), skipped={}, num_images=0, crc32=0) == self.header
            except UserError as error:
                logger.warning("%s", error)
        return False


def main(arguments: Sequence[str]) -> None:
    """Encode the images of a config; return at once if the shards are up to date."""
    parser = command_parser("python -m data_mix encode", "Encode images to code shards.", config="required")
    config, options = read_config(EncodeConfig, parser, section="codes", arguments=arguments)
    setup_logging()
    if not config.images:
        raise UserError(f"{options.config}: 'images' is empty; list at least one image source (make: DATA=)")
    if not config.output_dir:
        raise UserError("output_dir is empty; set it to the folder of the code shards, such as runs/demo/codes")
    external = _open_external(config)
    inputs_hash = _inputs_hash(config, external)
    if _is_up_to_date(Path(config.output_dir), inputs_hash=inputs_hash):
        print(f"{config.output_dir}: up to date")
        return
    with folder_lock(config.output_dir):
        encode(config, external=external, inputs_hash=inputs_hash)


def encode(config: EncodeConfig, *, external: "ExternalTokenizer | None", inputs_hash: str) -> None:
    """Write the missing shards, then summary.json; UserError if codes do not fit, or a source has no usable image."""
    set_up_cpu(config.num_threads)
    tokenizer = external or _open_qlip(config)
    if tokenizer.num_bits > MAX_BITS:
        name = config.external_tokenizer or config.visual_tokenizer
        raise UserError(f"{name}: codes of {tokenizer.num_bits} bits; shards hold at most {MAX_BITS}")
    out = Path(config.output_dir)
    jobs = _plan(config, tokenizer=tokenizer)
    missing = [job for job in jobs if not job.is_finished()]
    outdated = {path for path in out.glob("*") if SHARD_NAME.fullmatch(path.name)}
    outdated -= {job.path for job in jobs} - {job.path for job in missing}
    if num_shards := sum(path.suffix != ".partial" for path in outdated):
        logger.info("%s: replacing %d shards of another tokenizer, config or format", out, num_shards)
    (out / "summary.json").unlink(missing_ok=True)
    streams = _resume_streams(out / "streams.json", jobs=jobs)
    total, num_missing = (sum(len(job.indices) for job in some) for some in (jobs, missing))
    progress = Progress(total, label="encoding", unit="images", start=total - num_missing)
    for job in missing:
        with mixed_precision(config.precision):
            content = _encode_shard(job, tokenizer=tokenizer, progress=progress)
        if streams:  # saved before the shard, which depends on it
            write_json(out / "streams.json", {name: part.state() for name, part in streams.items()})
        write_shard(job.path, **content)
    summary = _summary(jobs) | {"precision": resolve_precision(config.precision)}
    for path in outdated - {job.path for job in jobs}:
        path.unlink(missing_ok=True)
    write_json(out / "summary.json", {"inputs_hash": inputs_hash} | summary)


def _open_external(config: EncodeConfig) -> "ExternalTokenizer | None":
    """The configured external tokenizer, if any."""
    if not config.external_tokenizer:
        return None
    from tokenizer.images import open_external_tokenizer

    return open_external_tokenizer(config.external_tokenizer, setting="external_tokenizer")


def _open_qlip(config: EncodeConfig) -> "QLIPImages":
    """The configured QLIP, on this process's device."""
    # These imports take seconds, which a run that is up to date should not spend.
    from tokenizer import load
    from tokenizer.images import QLIPImages

    qlip = QLIPImages(*load(config.visual_tokenizer))
    qlip.model.to(device())  # type: ignore[arg-type]
    return qlip


def _inputs_hash(config: EncodeConfig, external: "ExternalTokenizer | None") -> str:
    """Hash of all that decides what the shards hold; UserError if there is no tokenizer."""
    folder = Path(config.visual_tokenizer)
    if external is not None:
        qlip = external.fingerprint
    elif files := weight_files(folder):
        qlip = sha256_of(files[0]) if len(files) == 1 else weights_digest(folder)
    elif HUB_ID.fullmatch(config.visual_tokenizer) and not folder.parent.exists():
        qlip = config.visual_tokenizer  # hashing the weights would need a download
    else:
        remedy = "run make stage2 first, or set visual_tokenizer to the folder or hub id of one"
        raise UserError(f"there is no visual tokenizer in '{config.visual_tokenizer}'; {remedy}")
    sources = [source_fingerprint(source) for source in config.images]
    numbers = (config.seed, config.batch_size, config.samples_per_shard, config.limit)
    return short_hash(*numbers, qlip, sources, *_precision_key(config))


def _precision_key(config: EncodeConfig) -> list[str]:
    """The precision as a part of hashes, if it changes codes."""
    precision = resolve_precision(config.precision)
    return [] if precision == "fp32" else [precision]


def _is_up_to_date(out: Path, *, inputs_hash: str) -> bool:
    """Whether the summary is of these inputs and all of its shards are there, with whole headers."""
    try:
        summary = read_json(out / "summary.json")
        return summary["inputs_hash"] == inputs_hash and all(read_header(out / name) for name in summary["files"])
    except (UserError, LookupError, TypeError, FileNotFoundError):
        return False


def _plan(config: EncodeConfig, *, tokenizer: "CodeMaker") -> list[ShardJob]:
    """All shards of all sources, in the order in which they are made."""
    jobs: list[ShardJob] = []
    size = tokenizer.image_size
    of_tokenizer = ShardHeader(
        tokenizer.fingerprint, bits=tokenizer.num_bits, image_size=size, num_patches=tokenizer.num_codes
    )
    for split in get_args(Split):
        for source_config in config.images:
            try:
                source = open_image_source(source_config, split=split, size=size, seed=config.seed)
            except UserError:
                if split == "train" or source_config.val_fraction > 0:
                    raise
                logger.info("%s: no val split, because val_fraction=0", source_config.name)
                continue
            num_samples = min(len(source), config.limit or len(source))
            streamed = hub_stream(source)
            # The files of a streamed set are part of the plan: a new commit to the set means new codes.
            files = () if streamed is None else (streamed.files.digest,)
            parts = (config.seed, num_samples, config.samples_per_shard, *files, *_precision_key(config))
            plan = source_fingerprint(source_config, *parts)
            name, starts = source.name, range(0, num_samples, config.samples_per_shard)
            for shard, start in enumerate(starts):
                path = shard_path(config.output_dir, split=split, source=name, shard=shard)
                header = replace(of_tokenizer, split=split, source=name, shard=shard, num_shards=len(starts), plan=plan)
                indices = range(num_samples)[start : start + config.samples_per_shard]
                jobs.append(ShardJob(path, header, source, indices, config.batch_size))
    if not jobs:
        raise UserError("the sources in 'images' hold no image; check their paths")
    return jobs


def _resume_streams(path: Path, *, jobs: Sequence[ShardJob]) -> dict[str, HubStream]:
    """The streamed sources by split and name, resumed from `path`, so that their samples keep their numbers."""
    named = {f"{job.header.split}-{job.header.source}": hub_stream(job.source) for job in jobs}
    streams = {name: stream for name, stream in named.items() if stream is not None}
    if streams and path.exists():
        try:
            states = read_json(path)
            for name in streams.keys() & states.keys():
                streams[name].resume(states[name])
        except (LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged; delete {path.parent} and run make codes") from None
    return streams


def _encode_shard(job: ShardJob, *, tokenizer: "CodeMaker", progress: Progress) -> dict[str, Any]:
    """The arguments of `write_shard`."""
    skipped: Counter[str] = Counter()
    keys, captions, codes = [], [], [np.zeros((0, tokenizer.num_codes), dtype=np.int64)]
    num_batches = math.ceil(len(job.indices) / job.batch_size)
    with contextlib.closing(Prefetch(job, num_steps=num_batches)) as batches:
        for step in range(num_batches):
            samples, reasons = batches.batch(step)
            if samples:
                codes.append(tokenizer.encode(np.stack([sample.image_HWC for sample in samples])).numpy())
            keys += [sample.key for sample in samples]
            captions += [sample.captions for sample in samples]
            skipped.update(reasons)
            progress.advance(len(samples) + len(reasons), note=f"{skipped.total()} skipped" if skipped else None)
    header = replace(job.header, skipped=dict(skipped))
    return {"header": header, "keys": keys, "codes_BN": np.concatenate(codes), "captions": captions}


def _summary(jobs: Sequence[ShardJob]) -> dict[str, Any]:
    """Counts by split and source, from the headers of the finished shards.

    `unused` counts, by source and reason, what a listing of its files cannot use, such as captions without an image.
    """
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    bad_files: dict[str, str] = {}
    unused: dict[str, dict[str, int]] = {}
    for job in jobs:
        header = read_header(job.path)
        counts = splits.setdefault(header.split, {}).setdefault(header.source, {})
        new = {"samples": len(job.indices), "images": header.num_images, "shards": 1}
        skipped = dict(Counter(counts.get("skipped")) + Counter(header.skipped))
        counts |= {name: counts.get(name, 0) + number for name, number in new.items()} | {"skipped": skipped}
        if hasattr(job.source, "bad_files"):
            bad_files |= {str(file): reason for file, reason in job.source.bad_files.reasons.items()}
            unused[header.source] = {reason: number for reason, (number, _) in job.source.bad_files.counts.items()}
    for split, sources in splits.items():
        for name, counts in sources.items():
            reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(counts["skipped"].items()))
            if not counts["images"]:
                raise UserError(f"no {split} image of source '{name}' can be used ({reasons}); check its files")
            if reasons:
                logger.warning("%s of '%s': %d images; skipped: %s", split, name, counts["images"], reasons)
    tokenizer = {name: getattr(header, name) for name in ("fingerprint", "bits", "image_size", "num_patches")}
    found = {"splits": splits, "bad_files": bad_files, "unused": unused}
    return tokenizer | found | {"files": [job.path.name for job in jobs]}
