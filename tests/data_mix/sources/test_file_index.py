"""Indexes and copies of large files: made once, used by every process after that, and never for other files."""

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_mix.sources.file_index
import data_mix.sources.tables
import data_mix.sources.text
from data_mix.samples import ImageSource
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from tests.helpers.image_files import encoded, write_tar
from tests.helpers.processes import run_on_ranks
from um3.core.distributed import rank
from um3.core.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the indexes; any data counts as large."""
    monkeypatch.setattr(data_mix.sources.file_index, "CACHED_FROM_BYTES", 0)
    return tmp_path / "cache/index"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tar files of three images each."""
    write_shard(tmp_path / "shards", 0)
    write_shard(tmp_path / "shards", 1)
    return tmp_path / "shards"


def write_shard(folder: Path, shard: int) -> None:
    folder.mkdir(exist_ok=True)
    members = {}
    for number in range(3):
        members |= {f"{number}.png": encoded(number), f"{number}.txt": f"image {number} of shard {shard}".encode()}
    write_tar(folder / f"{shard}.tar", members)


def images(path: Path) -> ImageSource:
    return open_image_source(ImageSourceConfig(path=str(path), val_fraction=0.0), split="train", size=8, seed=0)


def texts(path: Path) -> TextSource:
    return open_text_source(TextSourceConfig(path=str(path), val_fraction=0.0), split="train")


def captions(source: ImageSource) -> list[str]:
    return [sample.captions[0] for sample in source]


def fail(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the files are listed again")


def test_tars_are_listed_once_and_again_after_a_change(
    cache: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = images(shards)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        second = images(shards)
    assert captions(second) == captions(first) and len(first) == 6
    assert [sample.key for sample in second] == [sample.key for sample in first]
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    write_shard(shards, 2)
    assert len(images(shards)) == 9 and len(before) == 2
    after = {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    assert len(after) == 3 and before.items() < after.items(), "only the new file is listed"


def test_names_may_be_any_bytes(cache: Path, tmp_path: Path) -> None:
    members = {"\udcff0.png": encoded(0), "\udcff0.txt": b"0", "\udcff1.png": encoded(1), "\udcff1.txt": b"1"}
    write_tar(tmp_path / "odd.tar", members)
    for _ in range(2):
        source = images(tmp_path / "odd.tar")
        assert captions(source) == ["0", "1"] and source[1].key == "odd.tar#\ufffd1"


def test_lines_are_found_once_and_bad_ones_reported_every_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"x": 1}\n{"text": "two"}\n')
    texts(tmp_path / "a.jsonl")
    caplog.clear()
    monkeypatch.setattr(data_mix.sources.text.JsonlDocuments, "_list_lines", fail)
    source = texts(tmp_path / "a.jsonl")
    assert list(source) == ["one", "two"] and "blank: 1" in caplog.text
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"a\.jsonl:3 \(has: x\)"):
        open_text_source(TextSourceConfig(path=str(tmp_path / "a.jsonl"), skip_bad_files=False), split="train")


def test_no_index_is_kept_of_damaged_files(cache: Path, shards: Path) -> None:
    os.truncate(shards / "1.tar", (shards / "1.tar").stat().st_size - 1024 * 9)
    assert 3 <= len(images(shards)) < 6 and len(list(cache.glob("*.arrow"))) == 1
    (shards / "1.tar").write_bytes(b"no tar at all" * 100)
    assert len(images(shards)) == 3 and len(list(cache.glob("*.arrow"))) == 1


def test_a_damaged_index_is_made_again(cache: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = captions(images(shards))
    index = next(cache.glob("*.arrow"))
    data = index.read_bytes()
    place = data.index((512).to_bytes(8, "little"))  # of a member's content in its tar
    for damaged in (b"", data[: len(data) // 2], data[:place] + b"1" + data[place + 1 :]):
        caplog.clear()
        index.write_bytes(damaged)
        assert captions(images(shards)) == expected and "is damaged" in caplog.text
        assert index.read_bytes() == data


def test_without_a_cache_folder_the_files_are_listed(
    cache: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UM3_CACHE", str(shards / "0.tar"))
    assert len(images(shards)) == 6 and caplog.text.count("set UM3_CACHE") == 1


def test_an_index_that_cannot_be_locked_costs_no_samples(
    cache: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / ".lock").mkdir(parents=True)
    source = images(shards)
    assert len(source) == 6 and not source.bad_files.reasons and "cannot lock" in caplog.text


def test_without_a_cache_folder_large_tables_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UM3_CACHE", str(copied))
    with pytest.raises(UserError, match=r"a\.parquet'; set UM3_CACHE"):
        texts(copied)


def test_small_data_has_no_index(shards: Path, tmp_path: Path) -> None:
    assert len(images(shards)) == 6 and not (tmp_path / "cache").exists()


@pytest.fixture
def copied(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet file of 40 texts that counts as large."""
    monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
    table = pa.table({"text": [f"text {number}" for number in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_a_copy_that_was_cut_is_made_again_and_a_changed_one_is_told(copied: Path, cache: Path) -> None:
    assert len(texts(copied)) == 40
    (copy,) = cache.parent.glob("tables/*.arrow")
    content = copy.read_bytes()
    for size in (0, 3, len(content) // 2):
        copy.write_bytes(content[:size])
        source = texts(copied)
        assert len(source) == 40 and copy.read_bytes() == content
    os.truncate(copy, 10)  # while it is used, which does not kill the process
    with pytest.raises(UserError, match=rf"{copy.name} is damaged; delete it"):
        source[0]
    copy.write_bytes(content.replace(b"text 17", b"best 17"))
    with pytest.raises(UserError, match=rf"{copy.name} is damaged; delete it"):
        texts(copied)
    copy.unlink()
    assert texts(copied)[39] == "text 39"


def test_a_full_disk_is_no_fault_of_the_source(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write \S+arrow: .*No space left.*UM3_CACHE"):
        texts(copied)


def count_listed_tars() -> list[int]:
    """(rank, number of tars that this rank listed, samples)."""
    data_mix.sources.file_index.CACHED_FROM_BYTES = 0
    real, opened = tarfile.open, []
    tarfile.open = lambda *args, **kwargs: (opened.append(args), real(*args, **kwargs))[1]  # type: ignore[assignment]
    source = images(Path(os.environ["SHARDS"]))
    return [rank(), len(opened), len(captions(source))]


@pytest.mark.slow
def test_one_rank_lists_for_all(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", str(shards))
    (first, first_listed, *samples), (second, second_listed, *others) = run_on_ranks(count_listed_tars, folder=tmp_path)
    assert (first, second, first_listed + second_listed) == (0, 1, 2) and samples == others == [6]
