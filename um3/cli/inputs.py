"""What the commands share: reading texts, images, JSON lines and the model, and printing results.

Shapes: B images, H height, W width.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.progress import track

if TYPE_CHECKING:
    import numpy as np

    from um3.inference.pipeline import UM3Pipeline

STDIN = "-"
MAX_STDIN_BYTES = 200_000_000
FORMATS = "give a PNG, JPEG, WEBP, GIF, BMP or TIFF file"


def read_texts(arguments: Sequence[str] | None, *, file: Path | None, kind: str) -> list[str]:
    """The arguments, else the non-empty lines of `file`, by default stdin; `kind` is prompt or text, for messages.

    Raises:
        UserError: both arguments and a file, no text, or a file that is not UTF-8.
    """
    arguments = list(arguments or [])
    if arguments == [STDIN]:
        arguments, file = [], file or Path(STDIN)
    if arguments and file is not None:
        raise UserError(f"{kind}s are given both as arguments and by --file; use one of them")
    if arguments:
        return arguments
    if file is None and sys.stdin.isatty():
        raise UserError(f"no {kind}; give it as an argument, by --file, or on stdin")
    source = str(file or STDIN)
    texts = [line.rstrip("\r") for line in _read(source).split("\n") if line.strip()]
    if not texts:
        raise UserError(f"no {kind} in {_name(source)}; write one per line")
    return texts


def read_json_lines(path: str, *, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file or of stdin; each has the `keys`.

    Raises:
        UserError: no line, or a line that is not such an object.
    """
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {_name(path)} is not JSON ({error})") from None
        if not isinstance(row, dict) or not row.keys() >= set(keys):
            raise UserError(f"line {number} of {_name(path)} is not an object with {' and '.join(keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{_name(path)} is empty; write one object per line, with {' and '.join(keys)}")
    return rows


def load_with_images(
    model: str, *, device: str, paths: Sequence[str | Path]
) -> "tuple[UM3Pipeline, np.ndarray[Any, Any]]":
    """The pipeline, and the images as uint8 (B, size, size, 3): centred squares at the tokenizer's size.

    Raises:
        UserError: a file that is missing (before the model is loaded) or not an image.
    """
    if missing := [path for path in paths if str(path) != STDIN and not Path(path).is_file()]:
        raise UserError(f"{missing[0]} does not exist; {FORMATS}")
    pipeline = load(model, device=device)
    import numpy as np

    from um3.core.images import ImageError, read_image, to_square

    size = pipeline.processor.image_size
    images_BHW3 = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(track(paths, total=len(paths), label="read")):
        try:
            source = _read_stdin() if str(path) == STDIN else Path(path)
            images_BHW3[index] = to_square(read_image(source), size=size)
        except ImageError as error:
            raise UserError(f"{path}: {error}; {FORMATS}") from None
    return pipeline, images_BHW3


def make_folder(out: Path) -> None:
    """Create the output folder unless it exists."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); pass another folder as --out") from None


def load(model: str, *, device: str) -> "UM3Pipeline":
    """The pipeline of a folder or hub id; `device` auto is the GPU if there is one."""
    folder = model_folder(model, kind="UM3 model")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; run make demo, or pass the folder of a trained UM3 as --model")
    typer.echo(f"loading {model}", err=True)
    import torch

    from um3.core.log import quiet_model_files, setup_logging
    from um3.inference.pipeline import UM3Pipeline

    setup_logging()
    quiet_model_files()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' is not available ({str(error).splitlines()[0]}); use cpu or auto") from None
    return UM3Pipeline.from_pretrained(model, device=device)


def show(columns: Mapping[str, Sequence[Any]], line: str = "", *, as_json: bool) -> None:
    """Print a result per item of the columns: as JSON, or in the format string `line`."""
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        typer.echo(json.dumps(row, ensure_ascii=False) if as_json else line.format(**row))


def file_names(labels: Iterable[str]) -> Iterator[str]:
    """`A red disk!` -> `0000-a-red-disk.png`, numbered."""
    for index, label in enumerate(labels):
        words = "".join(letter if letter.isalnum() else " " for letter in label.lower()).split()
        yield f"{index:04d}-{'-'.join(words)[:40].strip('-') or 'image'}.png"


def _name(path: str) -> str:
    return "stdin" if path == STDIN else path


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(content) > MAX_STDIN_BYTES:
        raise UserError(f"stdin has more than {MAX_STDIN_BYTES:,} bytes; pass files")
    return content


def _read(path: str) -> str:
    try:
        return (_read_stdin() if path == STDIN else Path(path).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_name(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from None
