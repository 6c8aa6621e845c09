"""The cache of results that evaluation measures item by item: a killed run resumes with the same result.

A cache is a file of JSON lines that only grows: {"protocol", "item", "result", "digest"} each. `protocol` names
everything that a result depends on besides its item, so a changed model, setting or image is measured again. The digest
is that of the other three. Each rank of a `torchrun` appends to a file of its own, and all ranks read all files.
"""

import glob
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.command import SkipCounter
from eval.tables import json_lines, read_records
from um3.core.distributed import barrier, is_main, rank, world_size
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.images import ImageError, read_image
from um3.core.progress import Progress, quiet_progress
from um3.core.text import printable

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

ImageModel = Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]
"""Maps the names and images (None for an item without one) of a batch to one result each, as plain JSON."""


class UnavailableError(UserError):
    """A model or file that a metric needs is missing; the message says how to provide it."""


class ResultsCache:
    """Results by item in STEM.jsonl, or STEM.rankR.jsonl on several ranks; in memory without a stem.

    A line that a kill cut short or whose digest differs is counted, reported and not used. Of two results of one item,
    the newer one is used.
    """

    def __init__(self, stem: str | Path | None = None, *, protocol: Any = "") -> None:
        self.protocol, self._stem = short_hash(protocol), Path(stem) if stem is not None else None
        self._results: dict[str, Any] = {}
        self.reload()

    def __contains__(self, item: str) -> bool:
        return item in self._results

    def __getitem__(self, item: str) -> Any:
        return self._results[item]

    def add(self, results: Mapping[str, Any]) -> None:
        """Append the results of several items at once; they are on disk when this returns."""
        self._results.update(results)
        if self._stem is None:
            return
        lines = []
        for item, result in results.items():
            row = {"protocol": self.protocol, "item": item, "result": result}
            lines.append(json.dumps(row | {"digest": short_hash(*row.values())}, ensure_ascii=False))
        path = self._stem.with_name(self._stem.name + (f".rank{rank()}" if world_size() > 1 else "") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            # Each line begins with its line break, which also ends a line that a kill has cut short.
            file.write("".join("\n" + line for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def reload(self) -> None:
        """Read what all ranks have written so far."""
        for path in self._paths():
            num_damaged = 0
            for record, _, _ in json_lines(path):
                values = [(record or {}).get(key) for key in ("protocol", "item", "result")]
                if record is None or record.get("digest") != short_hash(*values):
                    num_damaged += 1
                elif record["protocol"] == self.protocol:
                    self._results[record["item"]] = record["result"]
            if num_damaged:
                logger.warning(
                    "%s: %d damaged or cut line(s) are not used; their items are measured", path, num_damaged
                )

    def remove(self) -> None:
        """Delete the files, once the results are written elsewhere."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._stem.parent.glob(f"{glob.escape(self._stem.name)}*.jsonl")) if self._stem else []


def measure_images(
    files: Mapping[str, Path | bytes | None],
    *,
    cache: ResultsCache,
    open_model: Callable[[], ImageModel],
    label: str,
    skipped: SkipCounter,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Measure every image once and return the results in the order of `files`: its path, its encoded bytes, or None.

    The ranks share the batches, and each returns all results. Batches are fixed and measured whole: neither a kill nor
    the number of ranks changes which images a model sees together, so the results are equal to the last bit. Missing
    and unreadable images are skipped. `open_model` is called only if a result is missing.

    Raises:
        UnavailableError: `open_model` raised a UserError.
    """
    _join_ranks()
    items, problem = {name: _item(name, image) for name, image in files.items()}, None
    names = list(files)
    batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)][rank() :: world_size()]
    missing = [batch for batch in batches if any(items[name] and items[name] not in cache for name in batch)]
    if missing:
        count = sum(map(len, batches))
        progress = Progress(count, label=label, start=count - sum(map(len, missing)))
        try:
            model = open_model()
        except UserError as error:  # raised after the barrier, where other ranks wait
            problem, missing = UnavailableError(str(error)), []
    for batch in missing:
        results: dict[str, Any] = {}
        images: dict[str, Image.Image | None] = {}
        for name in filter(items.get, batch):
            file = files[name]
            try:
                images[name] = None if file is None else read_image(file)
            except ImageError as error:
                results[items[name]] = {"error": error.reason}
        if images:
            with quiet_progress():
                values = model(list(images), list(images.values()))
            results |= {items[name]: {"value": value} for name, value in zip(images, values, strict=True)}
        cache.add(results)
        progress.advance(len(batch))
    barrier()
    if problem is not None:
        if not is_main():
            print(printable(f"process {rank()}: {problem}"), file=sys.stderr)
        raise problem
    if world_size() > 1:
        cache.reload()
        if lost := sum(bool(item) and item not in cache for item in items.values()):
            raise UnavailableError(f"{lost} images were not measured: another process could not open the model")
    measured = {}
    for name, item in items.items():
        if item not in cache:
            skipped.add("missing image", name)
        elif "error" in cache[item]:
            skipped.add(f"unreadable image: {cache[item]['error']}", name)
        else:
            measured[name] = cache[item]["value"]
    return measured


def supplied_results(path: str | Path, *, field: str, ids: Mapping[str, str], skipped: SkipCounter) -> dict[str, Any]:
    """Read the results of another program: `field` of every image, by its name in `ids` or by the id there.

    The file has objects with `field` and "file" or "image_id", as JSON lines or as a list in a .json. An id is a
    number, also as padded text, or the stem of the image's name. A null is an empty result. Unreadable objects and
    images without one are skipped.

    Raises:
        UserError: no such file, no usable object in it, two for one image, or none whose id is that of an image.
    """
    form = f'objects with "file" or "image_id", and "{field}"'
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give a .jsonl file of {form}")
    supplied: dict[str, tuple[str, Any]] = {}
    try:
        for fields, place, _ in read_records(path):
            name = None if fields is None else fields.get("file", fields.get("image_id"))
            if fields is None or name is None or field not in fields:
                skipped.add(f"entry without file and {field}", place)
                continue
            if (key := _id_key(name)) in supplied:
                raise UserError(f"{place}: a second {field} for '{name}'; a file of results has one per image")
            supplied[key] = (str(name), "" if fields[field] is None else fields[field])
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as {form} ({type(error).__name__}: {error})") from None
    if not supplied:
        raise UserError(f"{path} contains no {form}")
    results = {}
    for name, image_id in ids.items():
        stem = Path(name).stem
        forms = (name, image_id, "" if image_id and stem.isdecimal() else stem)
        keys = [key for key in map(_id_key, forms) if key in supplied]
        if keys:
            results[name] = supplied[keys[0]][1]
        else:
            skipped.add(f"no {field} supplied", name)
    if not results:
        theirs, ours = next(iter(supplied.values()))[0], next(iter(ids.items()))
        raise UserError(
            f"{path} names no image of the set: its first is '{theirs}', that of the set {' or '.join(ours)}"
        )
    return results


def _id_key(name: Any) -> str:
    """One key for the forms of an image's id: 42, 42.0, "42" and "000042" are equal; other names stay as they are."""
    text = str(int(name)) if isinstance(name, float) and name.is_integer() else str(name).strip()
    return text.lstrip("0") or "0" if text.isdecimal() else text


def image_hash(image: Path | bytes) -> str:
    """Names an image by its bytes; empty for a missing file."""
    try:
        return short_hash(image if isinstance(image, bytes) else image.read_bytes())
    except OSError:
        return ""


def _item(name: str, image: Path | bytes | None) -> str:
    digest = "none" if image is None else image_hash(image)
    return f"{name} {digest}" if digest else ""


def _join_ranks() -> None:
    """Start the process group of a `torchrun`, for `barrier`."""
    import torch.distributed as group

    if world_size() > 1 and not group.is_initialized():
        # Ranks wait for the last one, which may finish its share days after the first.
        group.init_process_group("gloo", timeout=timedelta(days=7))
