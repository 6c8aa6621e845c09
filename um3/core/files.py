"""Files: which ones of a folder count, locks, and atomic writes (to a temporary path, synced, then renamed)."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from um3.core.errors import UserError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path`, on any failure it is removed."""
    path, partial = _partial(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it replaces `path`, on any failure it is removed."""
    path, partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path_inside in (*partial.rglob("*"), partial):
            _sync(path_inside)
        _replace_folder(path, by=partial)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: str | Path) -> tuple[Path, Path]:
    """The path, with its parent folder created, and the temporary path next to it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.with_name(path.name + PARTIAL_SUFFIX)


def _replace_folder(path: Path, *, by: Path) -> None:
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(by, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the phase that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the phase that writes it") from None


def walk_files(root: str | Path, *, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files below a folder, in the order of their paths: the one rule for what every reader of a folder sees.

    Names that begin with a dot, of files and of folders below `root`, are passed over. Symbolic links to files and
    folders are followed; a folder that contains itself through a link is entered once. `suffixes` are compared without
    case. Broken links, sockets and the like are no files.
    """
    files: list[Path] = []

    def visit(folder: str, above: frozenset[tuple[int, int]]) -> None:
        state = os.stat(folder)  # noqa: PTH116 (a million Path objects take seconds)
        if (state.st_dev, state.st_ino) in above:
            return
        above |= {(state.st_dev, state.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir():
                        visit(entry.path, above)
                    elif entry.is_file() and entry.name.lower().endswith(tuple(suffixes) or ""):
                        files.append(Path(entry.path))

    visit(os.fspath(root), frozenset())
    return sorted(files)


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Be the only writer of `folder`, which is created; the kernel releases the lock of a dead process.

    Take it on rank 0 only. Forked workers do not inherit it.

    Raises:
        UserError: another process holds it.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(f"another process is writing to {folder}; wait for it, or choose another folder") from None
        yield


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(*values: Any) -> str:
    """16 hex digits of a sha256 over plain values (JSON types, bytes, paths), as the name of a cache entry or protocol.

    Equal values have equal hashes in every process. The order of dictionary keys does not matter.
    """
    digest = hashlib.sha256()
    for value in values:
        is_bytes = isinstance(value, bytes)
        part = value if is_bytes else json.dumps(value, sort_keys=True, default=str).encode()
        digest.update(b"%d:%d:" % (is_bytes, len(part)) + part)
    return digest.hexdigest()[:16]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
