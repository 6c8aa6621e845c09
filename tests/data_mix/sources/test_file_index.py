"""Indexes of large data: made once, used by every process after that, and never when they do not fit."""

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

import data_mix.sources.file_index
import data_mix.sources.text
from data_mix.samples import ImageSource
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from tests.data_mix.sources.test_sources import encoded, write_tar
from tests.helpers.processes import run_on_ranks
from um3.core.distributed import rank
from um3.core.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Any data counts as large, and its index lies here."""
    monkeypatch.setattr(data_mix.sources.file_index, "CACHED_FROM_BYTES", 0)
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/index"


def write_shards(folder: Path, *, count: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        members = {}
        for number in range(3):
            members[f"{number}.png"] = encoded(3 * shard + number)
            members[f"{number}.txt"] = f"picture {number} of shard {shard}".encode()
        write_tar(folder / f"{shard}.tar", members)


def images(folder: Path) -> ImageSource:
    config = ImageSourceConfig(name="wds", path=str(folder), val_fraction=0.0)
    return open_image_source(config, split="train", size=8, seed=0)


def texts(folder: Path) -> TextSource:
    return open_text_source(TextSourceConfig(name="prose", path=str(folder), val_fraction=0.0), split="train")


def captions(source: ImageSource) -> list[str]:
    return [source[index].captions[0] for index in range(len(source))]


def not_again(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("looked through again")


def test_tars_are_listed_once_and_anew_when_they_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "shards")
    first = images(tmp_path / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", not_again)
        second = images(tmp_path / "shards")
    assert captions(second) == captions(first) and len(first) == 6
    assert [second[index].key for index in range(6)] == [first[index].key for index in range(6)]
    assert len(list(cache.iterdir())) == 1
    write_shards(tmp_path / "shards", count=3)
    assert len(images(tmp_path / "shards")) == 9 and len(list(cache.iterdir())) == 2


def test_names_of_any_bytes_stay_apart(cache: Path, tmp_path: Path) -> None:
    members = {f"\udcff{number}.{kind}": data for number in range(2) for kind, data in
               (("png", encoded(number)), ("txt", str(number).encode()))}  # fmt: skip
    write_tar(tmp_path / "odd.tar", members)
    for _ in range(2):
        source = images(tmp_path / "odd.tar")
        assert captions(source) == ["0", "1"] and source[1].key == "odd.tar#\udcff1"


def test_lines_are_found_once_and_blank_ones_named_every_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    first = texts(tmp_path / "a.jsonl")
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(data_mix.sources.text.JsonlDocuments, "_listing", not_again)
        second = texts(tmp_path / "a.jsonl")
    assert [second[index] for index in range(len(second))] == [first[index] for index in range(2)] == ["one", "two"]
    assert "1 blank documents left out" in caplog.text


def test_what_could_not_be_read_whole_is_not_kept(cache: Path, tmp_path: Path, short_waits: None) -> None:
    write_shards(tmp_path / "shards")
    cut = tmp_path / "shards/1.tar"
    os.truncate(cut, cut.stat().st_size - 1024 * 9)
    damaged = images(tmp_path / "shards")
    assert 3 <= len(damaged) < 6 and not cache.exists()
    cut.write_bytes(b"no tar at all" * 100)
    assert len(images(tmp_path / "shards")) == 3 and not cache.exists()


def test_a_damaged_index_is_made_again(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path / "shards")
    expected = captions(images(tmp_path / "shards"))
    index = next(cache.iterdir())
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    assert captions(images(tmp_path / "shards")) == expected and "is damaged" in caplog.text
    assert index.read_bytes() == whole


def test_without_a_place_for_it_the_data_is_read_all_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "file"))
    write_shards(tmp_path / "shards")
    assert len(images(tmp_path / "shards")) == 6 and "set UM3_CACHE to a folder of yours" in caplog.text


def test_small_data_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "shards")
    assert len(images(tmp_path / "shards")) == 6 and not (tmp_path / "cache").exists()


def test_a_mistake_in_the_data_is_still_one_line(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: no text in field 'text'"):
        texts(tmp_path / "a.jsonl")
    assert not cache.exists()


def listed_by_this_rank() -> list[int]:
    """(rank, how many tars this rank listed, samples)."""
    data_mix.sources.file_index.CACHED_FROM_BYTES = 0
    real, opened = tarfile.open, []
    tarfile.open = lambda *args, **kwargs: (opened.append(args), real(*args, **kwargs))[1]  # type: ignore[assignment]
    source = images(Path(os.environ["SHARDS"]))
    return [rank(), len(opened), len(captions(source))]


def test_one_rank_lists_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards")
    monkeypatch.setenv("SHARDS", str(tmp_path / "shards"))
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "cache"))
    assert run_on_ranks(listed_by_this_rank, folder=tmp_path) == [[0, 2, 6], [1, 0, 6]]
