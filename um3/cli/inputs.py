"""What the commands read and where they write: texts, pictures, codes, the model; with one clear line if it fails.

Shapes: B pictures, H height, W width.
"""

import json
import sys
from collections.abc import Iterator, Sequence
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
MAX_STDIN = 200_000_000


def read_texts(arguments: Sequence[str], *, file: Path | None, what: str) -> list[str]:
    """The arguments, or else the lines of a file or of stdin that are not empty.

    Raises:
        UserError: both or none of them, or bytes that are no UTF-8.
    """
    if list(arguments) == [STDIN]:
        arguments, file = [], file or Path(STDIN)
    if arguments and file is not None:
        raise UserError(f"{what}s both as arguments and by --file; give one of the two")
    if arguments:
        return list(arguments)
    if file is None and sys.stdin.isatty():
        raise UserError(f"no {what}; give it as an argument, by --file, or on stdin")
    lines = [line.rstrip("\r") for line in _read_text(str(file or STDIN)).split("\n")]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"no {what} in {_name(str(file or STDIN))}; write one a line")
    return texts


def read_rows(path: str, *, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, or of stdin, each with the `needed` keys."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {_name(path)} is no JSON ({error})") from None
        if not isinstance(row, dict) or not row.keys() >= set(needed):
            raise UserError(f"line {number} of {_name(path)} is no object with {' and '.join(needed)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{_name(path)} has no lines; write one object a line with {' and '.join(needed)}")
    return rows


def check_pictures(paths: Sequence[str | Path]) -> None:
    """Say that a file is missing before a model is loaded for it."""
    for path in paths:
        if str(path) != STDIN and not Path(path).is_file():
            raise UserError(f"{path}: no such file; give a PNG, JPEG, WEBP, GIF, BMP or TIFF file")


def read_pictures(paths: Sequence[str | Path], *, size: int) -> "np.ndarray":
    """The centred square of every picture at the tokenizer's size: uint8 (B, size, size, 3); one whole in memory."""
    import numpy as np

    from um3.core.images import ImageError, read_image, to_square

    pictures = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(track(paths, total=len(paths), label="read")):
        try:
            source = _bytes_from_stdin() if str(path) == STDIN else Path(path)
            pictures[index] = to_square(read_image(source), size=size)
        except ImageError as error:
            raise UserError(f"{path}: {error}; give a PNG, JPEG, WEBP, GIF, BMP or TIFF file") from None
    return pictures


def make_folder(out: Path) -> Path:
    """The folder, made if need be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); pass --out with a folder of yours") from None
    return out


def load(model: str, *, device: str) -> "UM3Pipeline":
    """The pipeline of a folder or hub id, on `device` or, for auto, on the GPU if there is one."""
    folder = model_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make demo or pass --model with the folder of a trained one")
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
        raise UserError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}); use cpu or auto") from None
    return UM3Pipeline.from_pretrained(model, device=device)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines on stdout."""
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


def file_names(labels: Sequence[str]) -> Iterator[str]:
    """`A red disk!` -> `0000-a-red-disk.png`, numbered."""
    for index, label in enumerate(labels):
        words = "".join(letter if letter.isalnum() else " " for letter in label.lower()).split()
        yield f"{index:04d}-{'-'.join(words)[:40].strip('-') or 'picture'}.png"


def _name(path: str) -> str:
    return "stdin" if path == STDIN else path


def _bytes_from_stdin() -> bytes:
    content = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise UserError(f"more than {MAX_STDIN:,} bytes on stdin; pass files")
    return content


def _read_text(path: str) -> str:
    try:
        content = _bytes_from_stdin() if path == STDIN else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_name(path)} is no UTF-8 text ({error.reason} at byte {error.start})") from None
