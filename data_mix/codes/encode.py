"""`make codes`: every image of the sources as codes of the visual tokenizer, in shards.

A shard holds what is usable of a fixed range of a source's samples, so an interrupted run keeps the finished
shards and makes the rest, byte for byte what an undisturbed run would have made.

Shape legend: B = images of one batch or shard, N = patches of one image.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch

from data_mix.codes.shards import MAX_BITS, ShardHeader, read_header, shard_path, write_shard
from data_mix.prefetch import Prefetch
from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.fingerprint import origin
from data_mix.sources.hub_streaming import streamed_part
from data_mix.sources.image_folder import OwnImages
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from um3.core.commands import command_parser, read_config
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.files import read_json, sha256_of, write_json
from um3.core.log import setup_logging
from um3.core.progress import Progress

if TYPE_CHECKING:
    from tokenizer.images import QLIPImages

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"(train|val)-[A-Za-z0-9._-]+-\d{5}\.parquet(\.partial)?")


@dataclass
class EncodeConfig:
    """What to encode, with which tokenizer, to where.

    visual_tokenizer: folder of the tokenizer, or its hub id.
    limit: samples of each source and split to encode, from its beginning; 0 for all.
    """

    visual_tokenizer: str = ""
    output_dir: str = "codes"
    images: list[ImageSourceConfig] = field(default_factory=list)
    seed: int = 0
    batch_size: int = 64
    samples_per_shard: int = 4096
    limit: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        if bare := [source.name for source in self.images if not source.has_captions]:
            raise ValueError(f"source '{bare[0]}' has no captions; codes are kept with captions, for UM3 to learn from")
        for name, least in (("batch_size", 1), ("samples_per_shard", 1), ("num_threads", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")


class ShardJob(NamedTuple):
    """One shard to make: `num_samples` samples of `source` from `start` on."""

    path: Path
    header: ShardHeader
    source: ImageSource
    start: int
    num_samples: int


def main(arguments: Sequence[str]) -> None:
    """Encode what a config asks for; returns at once where that is done already."""
    parser = command_parser("python -m data_mix encode", "Encode images to code shards.", config="required")
    config, options = read_config(EncodeConfig, parser, section="codes", arguments=arguments)
    setup_logging()
    if not config.images:
        raise UserError(f"{options.config}: 'images' names no source; list at least one to encode")
    request = _request(config)
    if _is_done(Path(config.output_dir), request=request):
        print(f"{config.output_dir}: up to date")
        return
    encode(config, request=request)


def encode(config: EncodeConfig, *, request: str) -> dict[str, Any]:
    """Make the shards that are not there yet and summary.json; returns the summary.

    `request` is kept in the summary, to know later what was asked for.

    Raises:
        UserError: the tokenizer cannot be loaded, its codes do not fit the shards, a source cannot be
            opened, or nothing in it can be used.
    """
    # Both take seconds, which a run with nothing to do should not.
    from tokenizer import load
    from tokenizer.images import QLIPImages

    torch.set_num_threads(config.num_threads)
    qlip = QLIPImages(*load(config.visual_tokenizer))
    qlip.model.to(device())  # type: ignore[arg-type]
    if qlip.num_bits > MAX_BITS:
        raise UserError(
            f"{config.visual_tokenizer} makes codes of {qlip.num_bits} bits; shards hold at most {MAX_BITS}"
        )
    jobs = _plan(config, qlip=qlip)
    waiting = [job for job in jobs if not _is_finished(job)]
    _remove_outdated(Path(config.output_dir), jobs=jobs, waiting=waiting)
    streams = _Streams(Path(config.output_dir) / "streams.json", jobs=jobs)
    total = sum(job.num_samples for job in jobs)
    start = total - sum(job.num_samples for job in waiting)
    progress = Progress(total, label="encoding", unit="images", start=start)
    for job in waiting:
        _make_shard(job, qlip=qlip, batch_size=config.batch_size, progress=progress, streams=streams)
    summary = _summary(jobs, num_patches=qlip.num_codes, request=request)
    write_json(Path(config.output_dir) / "summary.json", summary)
    return summary


def _request(config: EncodeConfig) -> str:
    """What was asked for, in a few characters: the values that shape the shards, the sources and the tokenizer."""
    shaping = [config.seed, config.batch_size, config.samples_per_shard, config.limit]
    described = json.dumps([shaping, _weights(config.visual_tokenizer), [origin(source) for source in config.images]])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _weights(qlip: str) -> str:
    """sha256 of a folder's weights; a hub id (owner/name, with no folder `owner` here) stands for itself.

    Raises:
        UserError: there is no such folder.
    """
    weights = Path(qlip) / "model.safetensors"
    if weights.exists():
        return sha256_of(weights)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", qlip) and not Path(qlip).parent.exists():
        return qlip
    raise UserError(f"there is no visual tokenizer in '{qlip}'; run make stage2 first, or set qlip to one")


def _is_done(out: Path, *, request: str) -> bool:
    if not (out / "summary.json").exists():
        return False
    summary = read_json(out / "summary.json")
    return summary.get("request") == request and all((out / name).exists() for name in summary.get("files", []))


def _plan(config: EncodeConfig, *, qlip: "QLIPImages") -> list[ShardJob]:
    """All shards of all sources, in the order in which they are made."""
    jobs: list[ShardJob] = []
    planned: set[tuple[str, str]] = set()
    fingerprint = qlip.model.fingerprint()
    for split in get_args(Split):
        for source_config in config.images:
            source = _open(source_config, split=split, size=qlip.image_size, seed=config.seed)
            if source is None:
                continue
            if not re.fullmatch(r"[A-Za-z0-9._-]+", source.name):
                raise UserError(f"image source '{source.name}': use letters, digits, '.', '_' and '-' in its name")
            num_samples = min(len(source), config.limit or len(source))
            num_shards = -(-num_samples // config.samples_per_shard)
            streamed = streamed_part(source)
            state = () if streamed is None else (streamed.digest,)  # a commit to the set makes another one of it
            plan = origin(source_config, config.seed, num_samples, config.samples_per_shard, *state)
            if (split, source.name) in planned:
                raise UserError(f"two image sources are called '{source.name}'; give each a name of its own")
            planned.add((split, source.name))
            for shard in range(num_shards):
                header = ShardHeader(
                    fingerprint=fingerprint,
                    bits=qlip.num_bits,
                    image_size=qlip.image_size,
                    split=split,
                    source=source.name,
                    shard=shard,
                    num_shards=num_shards,
                    plan=plan,
                )
                path = shard_path(config.output_dir, split=split, source=source.name, shard=shard)
                start = shard * config.samples_per_shard
                jobs.append(ShardJob(path, header, source, start, min(config.samples_per_shard, num_samples - start)))
    if not jobs:
        raise UserError("the sources in 'images' hold no image; point them at data")
    return jobs


def _open(config: ImageSourceConfig, *, split: Split, size: int, seed: int) -> ImageSource | None:
    """The source, or None for the val split of one that keeps nothing for it."""
    try:
        return open_image_source(config, split=split, size=size, seed=seed)
    except UserError:
        if split == "train" or config.val_fraction > 0:
            raise
        logger.info("%s: has no val split, and val_fraction=0 keeps none", config.name)
        return None


def _is_finished(job: ShardJob) -> bool:
    if not job.path.exists():
        return False
    try:
        return replace(read_header(job.path), skipped={}) == job.header
    except UserError as error:
        logger.warning("%s", error)
        return False


def _remove_outdated(out: Path, *, jobs: Sequence[ShardJob], waiting: Sequence[ShardJob]) -> None:
    """Remove shards of another tokenizer or plan, and what a killed run left half-written."""
    kept = {job.path for job in jobs} - {job.path for job in waiting}
    outdated = [path for path in out.glob("*") if SHARD_NAME.fullmatch(path.name) and path not in kept]
    shards = [path for path in outdated if path.suffix == ".parquet"]
    if shards:
        logger.info("%s: %d shards of another tokenizer or config are made anew", out, len(shards))
    for path in [out / "summary.json", *outdated]:
        path.unlink(missing_ok=True)


class _Streams:
    """What is known of streamed sources, kept beside the shards: their rows have the same numbers in every run."""

    def __init__(self, path: Path, *, jobs: Sequence[ShardJob]) -> None:
        self.path = path
        self.parts = {
            f"{job.header.split}-{job.header.source}": streamed
            for job in jobs
            if (streamed := streamed_part(job.source)) is not None
        }
        kept = read_json(path) if path.exists() else {}
        for name in self.parts.keys() & kept.keys():
            self.parts[name].go_on(kept[name])

    def keep(self) -> None:
        """Write it down; before a shard, which depends on it."""
        if self.parts:
            write_json(self.path, {name: part.state() for name, part in self.parts.items()})


def _make_shard(job: ShardJob, *, qlip: "QLIPImages", batch_size: int, progress: Progress, streams: _Streams) -> None:
    skipped: Counter[str] = Counter()
    keys, captions, codes = [], [], [np.zeros((0, qlip.num_codes), dtype=np.int64)]
    num_batches = -(-job.num_samples // batch_size)
    with Prefetch(_Reader(job, batch_size=batch_size), num_steps=num_batches) as batches:
        for number in range(num_batches):
            samples, unusable = batches.batch(number)
            if samples:
                codes.append(qlip.encode(np.stack([sample.image_HWC for sample in samples])).numpy())
            keys += [sample.key for sample in samples]
            captions += [sample.captions for sample in samples]
            skipped.update(unusable)
            progress.advance(len(samples) + len(unusable), note=f"{skipped.total()} skipped" if skipped else None)
    header = replace(job.header, skipped=dict(skipped))
    streams.keep()
    write_shard(job.path, header=header, keys=keys, codes_BN=np.concatenate(codes), captions=captions)


class _Reader:
    """Reads the samples of a shard, batch by batch."""

    def __init__(self, job: ShardJob, *, batch_size: int) -> None:
        self.job, self.batch_size = job, batch_size

    def batch(self, step: int) -> tuple[list[Sample], list[str]]:
        """The usable samples of the `step`-th batch, and for each of the others why it is not."""
        samples, unusable = [], []
        first = step * self.batch_size
        for place in range(first, min(first + self.batch_size, self.job.num_samples)):
            try:
                samples.append(self.job.source[self.job.start + place])
            except BadSample as error:
                unusable.append(error.reason)
        return samples, unusable


def _summary(jobs: Sequence[ShardJob], *, num_patches: int, request: str) -> dict[str, Any]:
    """Counts by split and source, from the headers of the finished shards."""
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        skipped = read_header(job.path).skipped
        counts = splits.setdefault(job.header.split, {}).setdefault(
            job.header.source, {"samples": 0, "images": 0, "shards": 0, "skipped": {}}
        )
        counts["samples"] += job.num_samples
        counts["images"] += job.num_samples - sum(skipped.values())
        counts["shards"] += 1
        counts["skipped"] = dict(Counter(counts["skipped"]) + Counter(skipped))
    for split, sources in splits.items():
        for name, counts in sources.items():
            if counts["skipped"]:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(counts["skipped"].items()))
                logger.warning("%s of '%s': %d images, left out: %s", split, name, counts["images"], reasons)
            if not counts["images"]:
                raise UserError(f"no {split} image of source '{name}' can be used: {reasons}")
    header = jobs[0].header
    set_aside = {
        str(file): reason
        for source in {id(job.source): job.source for job in jobs}.values()
        if isinstance(source, OwnImages)
        for file, reason in source.set_aside.reasons.items()
    }
    return {
        "request": request,
        "fingerprint": header.fingerprint,
        "bits": header.bits,
        "image_size": header.image_size,
        "num_patches": num_patches,
        "splits": splits,
        "set_aside": set_aside,
        "files": [job.path.name for job in jobs],
    }
