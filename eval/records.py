"""Judgements of images as JSON lines, one per image, added as the work gets done.

A killed run goes on behind its last whole line; every rank has a file of its own, and all of them are read. The same
format, with `file` and the judgement alone, is how results of other programs are supplied.
"""

import contextlib
import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.command import LeftOut, joined_ranks
from um3.core.distributed import barrier, is_main, rank, world_size
from um3.core.errors import UserError
from um3.core.files import sha256_of
from um3.core.progress import Progress, quiet_progress

if TYPE_CHECKING:
    from PIL import Image

Judge = Callable[[Sequence[str], "Sequence[Image.Image]"], Sequence[Any]]
"""Names of images, the images -> what is to be noted of each, as plain JSON."""


class NoJudgeError(UserError):
    """The model that judges cannot be had; its message says how to provide it."""


class Records:
    """STEM.jsonl, or STEM.rankR.jsonl on several ranks: {"file", "image", "made_by", "value" or "error"} a line.

    `made_by` names everything besides the image that the value depends on, `image` the image's bytes: a line that
    differs in one of them is of another judge or of an image that was drawn again, and counts for nothing.
    """

    def __init__(self, stem: str | Path, *, made_by: str) -> None:
        own = "" if world_size() == 1 else f".rank{rank()}"
        self.stem, self.made_by = Path(stem), made_by
        self.path = self.stem.with_name(f"{self.stem.name}{own}.jsonl")
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Read what all ranks have written so far."""
        for path in sorted(self.stem.parent.glob(f"{glob.escape(self.stem.name)}*.jsonl")):
            for _, row in _rows(path):
                if row is not None and row.get("made_by") == self.made_by:
                    self._found[row["file"], row.get("image", "")] = row

    def get(self, file: str, *, image: str) -> dict[str, Any] | None:
        """The line of an image, if there is one."""
        return self._found.get((file, image))

    def add(self, file: str, *, image: str, **judgement: Any) -> None:
        """Write one down at once."""
        row = {"file": file, "image": image, "made_by": self.made_by, **judgement}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as lines:
            if _is_cut(self.path):
                lines.write(b"\n")  # what a kill left stays a line of its own
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._found[file, image] = row


def judgements(
    files: Mapping[str, Path | bytes],
    *,
    stem: str | Path,
    made_by: str,
    open_judge: Callable[[], Judge],
    label: str,
    left_out: LeftOut,
    batch_size: int = 1,
) -> dict[str, Any] | None:
    """The judge's value for each image (by name: where it lies, or its bytes); what is on disk is not judged again.

    The work is shared over ranks; the first returns all values, in order, the others None. Missing and unreadable
    images are left out. `open_judge` is called only if something is left to do.

    Raises:
        NoJudgeError: `open_judge` raised a UserError.
    """
    with joined_ranks():
        records = Records(stem, made_by=made_by)
        own = dict(share(list(files.items())))
        problem = _judge_rest(own, records=records, open_judge=open_judge, label=label, batch_size=batch_size)
        barrier()
    if problem is not None:
        raise problem
    if not is_main():
        return None
    records.reload()
    values: dict[str, Any] = {}
    for file, path in files.items():
        image = image_name(path)
        row = records.get(file, image=image)
        if row is None:
            left_out.add("not judged" if image else "missing image", file)
        elif "error" in row:
            left_out.add(f"unreadable image: {row['error']}", file)
        else:
            values[file] = row["value"]
    return values


def _judge_rest(
    files: Mapping[str, Path | bytes],
    *,
    records: Records,
    open_judge: Callable[[], Judge],
    label: str,
    batch_size: int,
) -> NoJudgeError | None:
    """Judge what has no record yet. Without a judge that is told, not raised: other ranks may be waiting."""
    names = {file: image_name(path) for file, path in files.items()}
    todo = [file for file, image in names.items() if image and records.get(file, image=image) is None]
    if not todo:
        return None
    try:
        judge = open_judge()
    except UserError as error:
        return NoJudgeError(str(error))
    progress = Progress(len(names), label=label, start=len(names) - len(todo))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        _judge_batch({file: files[file] for file in batch}, names=names, judge=judge, records=records)
        progress.advance(len(batch))
    return None


def _judge_batch(
    files: Mapping[str, Path | bytes], *, names: Mapping[str, str], judge: Judge, records: Records
) -> None:
    from um3.core.images import ImageError, read_image

    images = {}
    for file, path in files.items():
        try:
            images[file] = read_image(path)
        except ImageError as error:
            records.add(file, image=names[file], error=error.reason)
    if images:
        with quiet_progress():
            values = judge(list(images), list(images.values()))
        for file, value in zip(images, values, strict=True):
            records.add(file, image=names[file], value=value)


def supplied(path: str | Path, *, field: str, files: Sequence[str], left_out: LeftOut) -> dict[str, Any]:
    """`field` of the line of each of `files`; lines that cannot be read, and files without a line, are left out.

    Raises:
        UserError: no such file, or not one usable line in it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give a .jsonl file with 'file' and '{field}' on each line")
    found = {}
    for number, row in _rows(Path(path)):
        if row is None or field not in row:
            left_out.add(f"line without file and {field}", f"{path}:{number}")
        else:
            found[row["file"]] = row[field]
    if not found:
        raise UserError(f"{path}: no line is a JSON object with 'file' and '{field}'")
    for file in files:
        if file not in found:
            left_out.add(f"no {field} supplied", file)
    return {file: found[file] for file in files if file in found}


def image_name(image: Path | bytes) -> str:
    """Names an image by its file's bytes; empty where there is none."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()[:12]
    with contextlib.suppress(OSError):
        return sha256_of(image)[:12]
    return ""


def share(items: Sequence[Any]) -> Sequence[Any]:
    """What this rank has to do of a list."""
    return items[rank() :: world_size()]


def judge_name(*values: Any) -> str:
    """A short name for a judge with all its settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The objects with a `file`, by line number; None for any other line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) and isinstance(row.get("file"), str) else None


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"
