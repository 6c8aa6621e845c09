"""Files and folders that are whole or absent, whatever happens while they are written."""

import errno
import math
import os
from pathlib import Path

import pytest

from um3.core import files
from um3.core.errors import UserError
from um3.core.files import atomic_file, atomic_folder, read_json, sha256_of, write_json, write_text

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    for text in ("first", "second"):
        with atomic_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_no_part(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@needs_dev_full
def test_a_full_disk_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    (tmp_path / "a.json.partial").symlink_to("/dev/full")  # every write to it finds the disk full
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(path, {"new": 2})
    assert caught.value.errno == errno.ENOSPC
    assert read_json(path) == {"old": 1} and names(tmp_path) == ["a.json"]


def test_a_full_disk_that_shows_only_at_the_sync_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    for name in ("first", "second"):
        with atomic_folder(path) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
            assert not (path / "sub" / name).exists()
        assert names(path / "sub") == [name]
    assert names(path.parent) == ["model"]


def test_leftovers_of_a_kill_do_not_enter_a_folder(tmp_path: Path) -> None:
    for leftover in ("model.partial", "model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").touch()
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "fresh").touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["fresh"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_folder_and_leaves_no_part(error: type[BaseException], tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "old").touch()
    with pytest.raises(error), atomic_folder(tmp_path / "model") as partial:
        (partial / "new").touch()
        raise error
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


@needs_dev_full
def test_a_full_disk_keeps_the_old_folder_and_leaves_no_part(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "old").touch()
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").symlink_to("/dev/full")
        (partial / "weights").write_bytes(bytes(100))
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if source.name == "model.partial":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(source, target)

    with atomic_folder(tmp_path / "model") as partial:
        (partial / "old").touch()
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="quota"), atomic_folder(tmp_path / "model") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_json_round_trip_refuses_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None, True]})
    assert read_json(path) == {"é": [1, 2.5, None, True]} and "é" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": math.nan})
    assert read_json(path) == {"é": [1, 2.5, None, True]} and names(tmp_path) == ["a.json"]


def test_unreadable_json_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json does not exist; run the phase"):
        read_json(tmp_path / "a.json")
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is not valid JSON .*delete it"):
            read_json(tmp_path / "a.json")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
