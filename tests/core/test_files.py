"""Files and folders are complete or absent, whatever happens during the writing."""

import errno
import math
import os
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.helpers.processes import locked
from um3.core import files
from um3.core.errors import UserError
from um3.core.files import atomic_file, atomic_folder, check_new, check_writable, folder_lock, read_json, short_hash

both = pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(atomic, path, text, *, before_the_end=lambda: None):
    """Write `text` as the file, or as the one file of the folder."""
    with atomic(path) as partial:
        (partial / "file" if atomic is atomic_folder else partial).write_text(text)
        before_the_end()


def content(path):
    return (path / "file" if path.is_dir() else path).read_text()


@both
def test_a_new_version_appears_complete_and_replaces_the_old_one(atomic, tmp_path):
    path = tmp_path / "deep" / "a"
    fill(atomic, path, "first")
    seen = []
    fill(atomic, path, "second", before_the_end=lambda: seen.append(content(path)))
    assert seen == ["first"] and content(path) == "second" and names(path.parent) == ["a"]


@both
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_version(atomic, error, tmp_path):
    fill(atomic, tmp_path / "a", "old")
    with pytest.raises(error):
        fill(atomic, tmp_path / "a", "half", before_the_end=Mock(side_effect=error))
    assert content(tmp_path / "a") == "old" and names(tmp_path) == ["a"]


@both
def test_a_disk_that_is_full_only_at_the_sync_counts_too(atomic, tmp_path, monkeypatch):
    fill(atomic, tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill(atomic, tmp_path / "a", "new")
    assert content(tmp_path / "a") == "old" and names(tmp_path) == ["a"]


def test_leftovers_of_a_kill_do_not_enter_a_folder(tmp_path):
    for leftover in ("model.partial", "model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").touch()
    fill(atomic_folder, tmp_path / "model", "old")
    fill(atomic_folder, tmp_path / "model", "new")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["file"]


def test_a_failing_rename_restores_the_old_folder(tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        if source.name == "model.partial":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(source, target)

    fill(atomic_folder, tmp_path / "model", "old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="quota"):
        fill(atomic_folder, tmp_path / "model", "new")
    assert content(tmp_path / "model") == "old" and names(tmp_path) == ["model"]


def test_json_round_trip_refuses_what_json_lacks(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": [1, 2.5, None, True]})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"loss": math.nan})
    assert read_json(path) == {"é": [1, 2.5, None, True]} and names(tmp_path) == ["a.json"]
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting"),
        (b"\xe9", "decode"),
        (b"", "Expecting"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5_000, "4300 digits"),
        (b"[]", "holds a JSON list, not a dict"),
        (b"{}", "has no 'inputs'"),
    ],
)
def test_unreadable_json_is_one_line_with_a_remedy(content, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json .*{reason}.*run the phase"):
        read_json(tmp_path / "a.json", keys=["inputs"])


def test_a_missing_file_and_a_folder_are_no_json(tmp_path):
    for path, reason in ((tmp_path / "a.json", "run the phase"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason):
            read_json(path)


def test_a_record_of_another_type_names_its_line():
    with pytest.raises(UserError, match=r"a.jsonl, line 3 holds a JSON NoneType, not a list"):
        files.parse_json("null", where="a.jsonl, line 3", kind=list)
    assert files.parse_json("[1]", where="a", kind=list) == [1]


@pytest.mark.parametrize("folder", ["/proc/1/x", "/dev/null/x", "/dev/null", "/tmp/" + "a" * 300])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(folder, tmp_path):
    check_writable(tmp_path / "deep")
    assert names(tmp_path / "deep") == []  # the check leaves nothing behind
    for claim in (check_writable, lambda path: folder_lock(path).__enter__()):
        with pytest.raises(UserError, match=f"cannot write to {folder}: .*; .*path"):
            claim(folder)


def test_hashes_are_those_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_of(tmp_path / "a").startswith(digest)
    values = [("ab",), ("a", "b"), (b"ab",), (["a", "b"],), ({"a": 1},), ({"a": 1.0},), ()]
    assert len({short_hash(*value) for value in values}) == len(values)
    assert short_hash({"b": 1, "a": Path("x")}) == short_hash({"a": "x", "b": 1}) and len(short_hash()) == 16


def test_every_reader_sees_the_same_files_of_a_folder(tmp_path):
    root = tmp_path / ".cache" / "data [1]"
    for name in ("b/2.PNG", "a.png", "._a.png", ".ipynb_checkpoints/a.png", "notes.txt", "b/.DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "c.png").write_bytes(b"x")
    (root / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "linked.png").symlink_to(root / "a.png")
    (root / "broken.png").symlink_to(root / "nothing.png")
    (root / "b" / "loop").symlink_to(root, target_is_directory=True)
    found = [path.relative_to(root).as_posix() for path in files.walk_files(root, suffixes=(".png",))]
    assert found == ["a.png", "b/2.PNG", "linked/c.png", "linked.png"]


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(UserError, match="another process"), folder_lock(folder):
        pass
    with folder_lock(folder):
        pass


def test_a_lock_may_be_waited_for(tmp_path):
    has_lock = threading.Event()

    def take():
        with folder_lock(tmp_path, wait=True):
            has_lock.set()

    waiting = threading.Thread(target=take)
    with locked(tmp_path):
        waiting.start()
        assert not has_lock.wait(0.5)
    waiting.join(60)
    assert has_lock.is_set()


def test_a_folder_needs_a_name_and_a_lock_its_place(tmp_path):
    for refused in (lambda: check_new(".", kind="folder"), lambda: fill(atomic_folder, Path(), "x")):
        with pytest.raises(UserError, match=r"'\.' has no name; give the path of a new folder"):
            refused()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*\.lock"), folder_lock(tmp_path):
        pass
