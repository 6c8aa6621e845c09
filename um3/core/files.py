"""Files: which ones of a folder count, locks, and atomic writes (to a temporary path, synced, then renamed)."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from um3.core.errors import UserError, system_problem

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path`, on any failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
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
    path = _named(path, kind="folder")
    partial, old = (path.with_name(path.name + suffix) for suffix in (PARTIAL_SUFFIX, ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path_inside in (*partial.rglob("*"), partial):
            _sync(path_inside)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, kind: type[Any] = object, *, keys: Sequence[str] = ()) -> Any:
    """The value of a JSON file; UserError if it cannot be read or is not what `parse_json` accepts."""
    try:
        return parse_json(Path(path).read_bytes(), where=path, kind=kind, keys=keys)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the phase that writes it first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {system_problem(error)}") from None
    except UserError as error:
        raise UserError(f"{error}; delete it and run the phase that writes it") from None


def parse_json(text: str | bytes, *, where: str | Path, kind: type[Any] = object, keys: Sequence[str] = ()) -> Any:
    """The value of a JSON text (a file, or a line of one); every reader of JSON from outside goes through here.

    UserError, which begins with `where`: not JSON, nested too deeply, a number of thousands of digits, another Python
    type than `kind` (such as list), or no object with all of `keys`.
    """
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise UserError(f"{where} is not valid JSON ({reason})") from None
    kind = dict if keys else kind
    if not isinstance(value, kind):
        raise UserError(f"{where} holds a JSON {type(value).__name__}, not a {kind.__name__}")
    if keys and (missing := set(keys).difference(value)):
        raise UserError(f"{where} has no '{min(missing)}'")
    return value


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


def _named(path: str | Path, *, kind: str) -> Path:
    if not Path(path).name:  # such as "."
        raise UserError(f"'{path}' has no name; give the path of a new {kind}")
    return Path(path)


def check_new(path: str | Path, *, kind: Literal["file", "folder"]) -> None:
    """UserError if a command that writes a new file or folder (`kind`) would replace what is at `path`."""
    path = _named(path, kind=kind)
    is_empty = kind == "folder" and path.is_dir() and {inside.name for inside in path.iterdir()} <= {".lock"}
    if path.exists() and not is_empty:
        raise UserError(f"{path} already exists; choose another {kind} or delete it")


def check_writable(folder: str | Path) -> None:
    """Create `folder`, and raise UserError now, before hours of work, if no file can be written in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        error.filename = folder
        raise UserError(f"cannot write to {system_problem(error)}") from None


@contextlib.contextmanager
def folder_lock(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only writer of `folder`, which is created; UserError if another process is, unless you `wait` for it, or
    if it is not writable or cannot be locked.

    The kernel releases the lock of a dead process. Take it on rank 0 only; forked workers do not inherit it.
    """
    check_writable(folder)
    path = Path(folder) / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and error.filename is None:
                problem = f"another process is writing to {folder}; wait for it, or choose another folder"
                raise UserError(problem) from None
            error.filename = path
            raise UserError(f"cannot lock {system_problem(error)}") from None
        yield


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(*values: Any) -> str:
    """16 hex digits of a sha256 over plain values (JSON types, bytes, paths); the order of keys does not matter."""
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
