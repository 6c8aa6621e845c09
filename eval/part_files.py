"""The files of a part of the evaluation, PART.json and PART.npz: written together, and checked when they are read."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.scores import PartResult, Score, scores_of, write_scores
from um3.core.config import to_dict
from um3.core.errors import UserError
from um3.core.files import atomic_file, read_json, sha256_of
from um3.core.metrics import commit, machine, versions
from um3.core.text import valid_text

NUMBERS = ("seconds", "peak_memory_gib", "steps", "processes")


class Part(NamedTuple):
    """What PART.json and PART.npz hold; `images` are uint8 (N, H, W, 3) by name."""

    record: dict[str, Any]
    scores: list[Score]
    images: dict[str, NDArray]

    @property
    def samples(self) -> dict[str, Any]:
        """The samples that the part kept to look at; empty without any."""
        return self.record.get("samples") or {}


def write_part(path: Path, result: PartResult, **about: Any) -> None:
    """Write the images, then PART.json (`path`) with `about` and the digests of PART.npz and of every PART_*.jsonl."""
    images = path.with_suffix(".npz")
    write_arrays(images, result.images)
    digests = {file.name: sha256_of(file) for file in (images, *sorted(path.parent.glob(f"{path.stem}_*.jsonl")))}
    write_scores(path, result.scores, samples=result.samples, files_sha256=digests, **about)


def provenance(config: Any, *, began: float) -> dict[str, Any]:
    """What a result depends on besides its data, and the seconds since `began` (of `time.monotonic`)."""
    about = {"seconds": round(time.monotonic() - began, 1), "config": to_dict(config)}
    return about | {"commit": commit(), "versions": versions(), "machine": machine()}


def read_part(path: Path) -> Part:
    """Read what `write_part` wrote. Raises UserError: a file is missing, damaged or of another form."""
    record = read_record(path)
    digests = record.get("files_sha256")
    for name in digests if isinstance(digests, dict) and digests else [path.with_suffix(".npz").name]:
        _check_digest(path.parent / name, record)
    return Part(record, scores_of(record, path), read_images(path, record))


def _check_digest(file: Path, record: dict[str, Any]) -> None:
    try:
        is_whole = sha256_of(file) == record["files_sha256"][file.name]
    except (OSError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{file} is missing, or not the file that was written with the scores; run make eval")


def read_images(path: Path, record: dict[str, Any]) -> dict[str, NDArray]:
    """The images of PART.json, whose content is `record`; none if it names no files and there is no PART.npz.

    Raises:
        UserError: they are missing, damaged, of another form, or not those of PART.json.
    """
    images, names_files = path.with_suffix(".npz"), "files_sha256" in record
    if not images.exists() and not names_files:
        return {}
    if names_files:
        _check_digest(images, record)
    arrays = read_arrays(images)
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
            raise UserError(f"{images} holds {name}, which is not uint8 (N, H, W, 3); delete it and run make eval")
    return arrays


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object about a phase: text that UTF-8 cannot hold and numbers that are not finite become text.

    Raises:
        UserError: the file is missing or damaged, or one of `NUMBERS` is not a number.
    """
    try:
        record = json.loads(valid_text(json.dumps(read_json(path), ensure_ascii=False)), parse_constant=str)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run the phase that writes it") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} does not hold a JSON object; delete it and run the phase that writes it")
    if odd := [name for name in NUMBERS if not isinstance(record.get(name, 0), int | float)]:
        raise UserError(f"{path}: {odd[0]} is {record[odd[0]]}, not a number; run the phase that writes it")
    return record


def write_arrays(path: Path, arrays: dict[str, NDArray]) -> None:
    """Write a compressed .npz atomically."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: str | Path) -> dict[str, NDArray]:
    """Read an .npz, without pickle. Raises UserError: the file is missing, damaged, or no .npz of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise a dozen unrelated types
        raise UserError(f"{path} is no whole .npz of plain arrays ({type(error).__name__})") from None
