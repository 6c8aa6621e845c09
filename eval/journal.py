"""What a long measurement has finished, a JSON line each, so that after a kill it goes on where it was."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from um3.core.files import write_text


class Journal:
    """Results by key, in a file that only grows; without a path they live in memory.

    The first line names the request (the models' weights, the settings, the data): a file of another request is begun
    anew. A line that a kill cut short is taken off.
    """

    def __init__(self, path: Path | None = None, *, request: str = ""):
        self.path, self.results = path, dict[str, list[Any]]()
        if path is None:
            return
        lines = _whole_lines(path)
        if not lines or lines[0] != {"request": request}:
            lines = [{"request": request}]
        self.results = {line["key"]: line["results"] for line in lines[1:]}
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def __getitem__(self, key: str) -> list[Any]:
        return self.results[key]

    def add(self, key: str, results: Sequence[Any]) -> None:
        """Keep the results of `key`; they are on disk when this returns."""
        self.results[key] = list(results)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "results": list(results)}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: what it led to has been written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def key(kind: str, values: Sequence[Any]) -> str:
        """Names the work on `values`."""
        return hashlib.sha256(json.dumps([kind, values]).encode()).hexdigest()[:24]


def _whole_lines(path: Path) -> list[Any]:
    """The lines of a file up to the first that is not JSON."""
    lines: list[Any] = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    return lines
