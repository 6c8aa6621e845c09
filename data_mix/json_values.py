"""The values of a large JSON list or of JSON lines, one at a time, each with its place; broken ones are passed over.

Not ijson or one json.loads: the first stops at a broken value, the second also holds 2 GB of JSON as 10 GB of objects.
"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_mix.sources.bad_files import DamagedFile

WINDOW_BYTES = 16 * 2**20  # of the file that are decoded at once; a value of more than half of it counts as broken
BROKEN = object()  # in place of the value
_BETWEEN = re.compile(r"[\s,\[\]]*")
_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?\s*([\[{])")


def json_values(file: Path, *, key: str) -> Iterator[tuple[int, int, Any]]:
    """Byte offset, length and value of each item of the JSON list, or of the JSON lines, in `file`; BROKEN for one that
    is not JSON, and for the missing end of a list.

    key: of every item; behind broken JSON, reading goes on at the next object with it.
    DamagedFile: the file begins with neither a list nor an object.
    """
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        beginning = _BEGINNING.match(data)
        if beginning is None:
            raise DamagedFile(f"{file}: neither a JSON list nor JSON lines; check the path")
        yield from _values(data, key=key, start=beginning.start(1))
        if beginning[1] == b"[" and not data[-1024:].rstrip().endswith(b"]"):
            yield size, 0, BROKEN


def _values(data: Any, *, key: str, start: int) -> Iterator[tuple[int, int, Any]]:
    decode, size = json.JSONDecoder().raw_decode, len(data)
    text, place, broken = "", 0, -1  # a window that begins at `start`, a place in it, and where broken JSON began
    while True:
        place = _BETWEEN.match(text, place).end() if broken < 0 else place  # type: ignore[union-attr]
        if place == len(text):
            start += len(text)
            text, place = str(data[start : start + WINDOW_BYTES], "latin-1"), 0  # a character a byte
            if not text:
                break
            continue
        try:
            value, end = decode(text, place)
        except (ValueError, RecursionError):
            if place > WINDOW_BYTES // 2 and start + len(text) < size:  # the window may end within the value
                start += place
                text, place = str(data[start : start + WINDOW_BYTES], "latin-1"), 0
                continue
            value, end = BROKEN, place + 1
        if value is BROKEN and broken < 0:
            broken = start + place
            yield broken, 0, BROKEN
        elif value is not BROKEN and (broken < 0 or (isinstance(value, dict) and key in value)):
            broken = -1
            offset, length = start + place, end - place
            yield offset, length, value if text[place:end].isascii() else _decoded(data[offset : offset + length])
        if broken >= 0:
            place = text.find("{", end)
            place = len(text) if place < 0 else place
        else:
            place = end


def _decoded(data: bytes) -> Any:
    """The value of UTF-8 JSON; BROKEN for bytes that are not UTF-8."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        return BROKEN
