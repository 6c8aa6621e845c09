"""What the commands share: reading texts, images and JSON lines, the output folder, and printing results.

Shapes: B images, H height, W width.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from um3.core.errors import UserError
from um3.core.files import parse_json, walk_files
from um3.core.progress import track
from um3.core.text import printable, text_lines, valid_text

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"
MAX_STDIN_BYTES = 200_000_000


def read_texts(arguments: Sequence[str] | None, *, file: Path | None, kind: str) -> list[str]:
    """The arguments, else the non-empty lines of `file`, by default stdin; `kind` is prompt or text, for messages."""
    arguments = list(arguments or [])
    if arguments == [STDIN]:
        arguments, file = [], file or Path(STDIN)
    if arguments and file is not None:
        raise UserError(f"{kind}s are given both as arguments and by --file; use one of them")
    if arguments:
        return [valid_text(argument) for argument in arguments]
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError(f"no {kind}; give it as an argument, by --file, or on stdin")
    source = str(file or STDIN)
    texts = [line for line in text_lines(_read(source)) if line.strip()]
    if not texts:
        raise UserError(f"no {kind} in {_name(source)}; write one per line")
    return texts


def read_json_lines(path: str, *, types: Mapping[str, type]) -> dict[int, dict[str, Any]]:
    """The objects of a JSON lines file or of stdin, by line number; each has the keys of `types` with such values."""
    rows = {}
    for number, line in enumerate(text_lines(_read(path)), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {_name(path)}"
        rows[number] = row = parse_json(line, where=where, keys=list(types))
        for key, kind in types.items():
            if not isinstance(row[key], kind):
                raise UserError(f"{where}: '{key}' is {json.dumps(row[key])[:40]}; it must be a {kind.__name__}")
            row[key] = valid_text(row[key]) if kind is str else row[key]
    if not rows:
        raise UserError(f"{_name(path)} is empty; write one object per line, with {' and '.join(types)}")
    return rows


def find_images(paths: list[str]) -> list[str]:
    """`paths`, which must exist, with every folder replaced by the images in it, which `walk_files` finds."""
    from um3.core.images import SUFFIXES

    files: list[str] = []
    for path in paths:
        found = [path] if path == STDIN or Path(path).is_file() else []
        if Path(path).is_dir():
            found = list(map(str, walk_files(path, suffixes=SUFFIXES)))
        if not found:
            raise UserError(f"'{path}' is neither a file nor a folder with images; give one, or - for stdin")
        files += found
    return files


def read_images(paths: Sequence[str], *, size: int) -> "list[Image.Image]":
    """The centred squares of the images, `size` pixels wide, with the metadata of those that are ours."""
    from PIL import Image

    from um3.core.images import ImageError, read_image, to_square

    squares = []
    for path in track(paths, total=len(paths), label="read"):
        try:
            image = read_image(_read_stdin() if path == STDIN else Path(path))
        except ImageError as error:
            raise UserError(f"{path}: {error}; {error.remedy}") from None
        squares.append(Image.fromarray(to_square(image, size=size)))
        squares[-1].info = image.info
    return squares


def show(
    columns: Mapping[str, Sequence[Any]], line: str = "", *, as_json: bool, escape: Callable[[str], str] = printable
) -> None:
    """Print a result per item of the columns: as JSON, or in the format string `line` with every text escaped."""
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        escaped = {name: escape(value) if isinstance(value, str) else value for name, value in row.items()}
        typer.echo(json_text(row) if as_json else line.format(**escaped))


def printable_lines(text: str) -> str:
    """`text` for a terminal: `printable`, but lines and tabs stay as they are."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON for a terminal and for UTF-8 files: valid text, in ASCII where it has control characters."""
    text = valid_text(json.dumps(value, ensure_ascii=False, indent=indent))
    is_safe = all(line == printable(line) for line in text.split("\n"))
    return text if is_safe else json.dumps(json.loads(text), indent=indent)


def file_names(labels: Iterable[str], *, start: int = 0) -> Iterator[str]:
    """`A red disk!` -> `0000-a-red-disk.png`, numbered from `start`; no label leads out of the folder."""
    for index, label in enumerate(labels, start=start):
        words = "".join(letter if letter.isalnum() else " " for letter in label.lower()).split()
        yield f"{index:04d}-{'-'.join(words)[:40].strip('-') or 'image'}.png"


def _name(path: str) -> str:
    return "stdin" if path == STDIN else path


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise UserError("stdin is closed; pass a file")
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
