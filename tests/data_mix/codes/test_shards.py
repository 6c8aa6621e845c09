"""Code shards: the round trip, and every way in which a folder of shards can be wrong."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_mix.codes.shards import (
    SCHEMA,
    CodeShards,
    ShardHeader,
    open_code_sources,
    read_header,
    shard_path,
    write_shard,
)
from data_mix.samples import BadSample
from data_mix.sources import bad_files as set_aside
from um3.core.errors import UserError

HEADER = ShardHeader(
    fingerprint="f" * 64, bits=28, image_size=32, split="train", source="scenes", shard=0, num_shards=3, plan="p"
)


def random_codes(shard: int, *, rows: int = 5) -> np.ndarray:
    return np.random.default_rng(shard).integers(0, 2**28, size=(rows, 16))


def write(folder: Path, *, shard: int, rows: int = 5, **changes: Any) -> Path:
    header = dataclasses.replace(HEADER, shard=shard, **changes)
    path = shard_path(folder, split=header.split, source=header.source, shard=shard)
    keys = [f"{header.source}-{shard}-{row}" for row in range(rows)]
    captions = [(f"caption {row}", "short") if row % 2 else (f"caption {row}",) for row in range(rows)]
    write_shard(path, header=header, keys=keys, codes_BN=random_codes(shard, rows=rows), captions=captions)
    return path


def write_all(folder: Path, **changes: Any) -> list[Path]:
    return [write(folder, shard=shard, **changes) for shard in range(3)]


def test_round_trip_by_index(tmp_path: Path) -> None:
    write(tmp_path, shard=0)
    write(tmp_path, shard=1, rows=0)
    write(tmp_path, shard=2, rows=3)
    shards = CodeShards(tmp_path, split="train", expected_fingerprint="f" * 64)
    assert (len(shards), shards.num_patches, shards.bits, shards.image_size) == (8, 16, 28, 32)
    for index, (shard, row) in enumerate([(0, r) for r in range(5)] + [(2, r) for r in range(3)]):
        sample = shards[index]
        assert sample.key == f"scenes-{shard}-{row}"
        assert sample.codes_N.dtype == torch.int64
        assert torch.equal(sample.codes_N, torch.from_numpy(random_codes(shard, rows=5 if shard == 0 else 3)[row]))
        assert sample.captions[0] == f"caption {row}"
        assert len(sample.captions) == 1 + row % 2
    with pytest.raises(IndexError):
        shards[8]


def test_file_is_the_contract_between_the_rooms(tmp_path: Path) -> None:
    path = write(tmp_path, shard=0, num_shards=1, skipped={"cannot be decoded": 2})
    table = pq.read_table(path)
    assert table.schema.remove_metadata() == SCHEMA
    assert table.schema.metadata[b"fingerprint"] == b"f" * 64
    assert (table.schema.metadata[b"bits"], table.schema.metadata[b"image_size"]) == (b"28", b"32")
    assert table["height"].to_pylist() == [4] * 5
    assert read_header(path).skipped == {"cannot be decoded": 2}
    assert path.name == "train-scenes-00000.parquet"


def test_32_bit_codes_survive_and_more_are_refused(tmp_path: Path) -> None:
    header = dataclasses.replace(HEADER, bits=32, num_shards=1)
    path = tmp_path / "x.parquet"
    codes_BN = np.array([[2**32 - 1, 0, 2**31, 5]])
    write_shard(path, header=header, keys=["k"], codes_BN=codes_BN, captions=[["c"]])
    assert CodeShards(tmp_path, split="train")[0].codes_N.tolist() == codes_BN[0].tolist()
    with pytest.raises(ValueError, match="33 bits"):
        write_shard(path, header=dataclasses.replace(header, bits=33), keys=["k"], codes_BN=codes_BN, captions=[["c"]])
    with pytest.raises(ValueError, match="outside 28 bits"):
        write_shard(path, header=HEADER, keys=["k"], codes_BN=codes_BN, captions=[["c"]])


def test_splits_sources_and_globs_are_kept_apart(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, shard=0, source="digits", num_shards=1)
    write(tmp_path, shard=0, split="val", num_shards=1, rows=2)
    assert len(CodeShards(tmp_path, split="val")) == 2
    assert len(CodeShards(tmp_path, split="train")) == 20
    assert len(CodeShards(f"{tmp_path}/train-digits-*.parquet", split="train")) == 5
    sources = open_code_sources(tmp_path, split="train")
    assert {name: len(source) for name, source in sources.items()} == {"digits": 5, "scenes": 15}
    assert sources["digits"].name == "digits"


def test_the_mapped_copy_follows_the_shard(tmp_path: Path) -> None:
    write(tmp_path, shard=0, num_shards=1)
    assert len(CodeShards(tmp_path, split="train")) == 5
    write(tmp_path, shard=0, num_shards=1, rows=2)
    assert len(CodeShards(tmp_path, split="train")) == 2
    assert len(list((tmp_path / ".arrow").iterdir())) == 1


def test_nothing_there_asks_for_make_codes(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no train codes in .* run make codes first"):
            CodeShards(where, split="train")
        with pytest.raises(UserError, match="run make codes first"):
            open_code_sources(where, split="train")


def test_a_missing_or_foreign_shard_is_noticed(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    paths[1].unlink()
    with pytest.raises(UserError, match="do not make up the 3 of one encoding"):
        CodeShards(tmp_path, split="train")
    write(tmp_path, shard=1, plan="another")
    with pytest.raises(UserError, match="do not make up the 3"):
        CodeShards(tmp_path, split="train")


def test_another_tokenizers_codes_show_both_fingerprints(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(UserError, match=f"{'f' * 64}.*{'e' * 64}"):
        CodeShards(tmp_path, split="train", expected_fingerprint="e" * 64)


@pytest.mark.parametrize("change", [{"fingerprint": "e" * 64}, {"bits": 30}, {"image_size": 64}])
def test_shards_that_disagree_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_all(tmp_path)
    write(tmp_path, shard=2, **change)
    with pytest.raises(UserError, match=f"disagree: {next(iter(change))}"):
        CodeShards(tmp_path, split="train")


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    data = paths[1].read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"PAR1 nonsense PAR1"):
        paths[1].write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-scenes-00001.parquet is damaged .*delete it and run make codes"):
            CodeShards(tmp_path, split="train")
    pq.write_table(pq.read_table(paths[0]).replace_schema_metadata(None), paths[1])
    with pytest.raises(UserError, match=r"train-scenes-00001.parquet is not a code shard"):
        CodeShards(tmp_path, split="train")


def spoil(path: Path) -> None:
    """Leave the footer whole and the data before it not."""
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(200) + data[204:])


def test_a_shard_that_cannot_be_read_is_set_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, short_waits: None
) -> None:
    caplog.set_level("INFO")
    paths = [write(tmp_path, shard=shard, num_shards=5) for shard in range(5)]
    spoil(paths[1])
    shards = CodeShards(tmp_path, split="train")
    assert len(shards) == 25 and shards[0].key == "scenes-0-0"
    paths[4].unlink()
    for index in (5, 9, 20, 24):
        with pytest.raises(BadSample, match="shard set aside"):
            shards[index]
    assert list(shards.set_aside.reasons) == [paths[1], paths[4]]
    assert "damaged" in shards.set_aside.reasons[paths[1]] and "No such file" in shards.set_aside.reasons[paths[4]]
    assert [f"{number:05d}" in caplog.text for number in range(5)] == [False, True, False, False, True]
    assert caplog.text.count("trying again") == 1 + len(set_aside.RETRY_WAITS_S), "once, not at every sample"
    assert shards[4].key == "scenes-0-4"


def test_a_hiccup_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_all(tmp_path)
    shards = CodeShards(tmp_path, split="train")
    away = paths[1].rename(tmp_path / "away")
    monkeypatch.setattr(set_aside, "RETRY_WAITS_S", (0.01, 0.5, 5.0))
    threading.Timer(0.2, away.rename, [paths[1]]).start()
    assert shards[7].key == "scenes-1-2" and not shards.set_aside.reasons


def test_more_than_half_unreadable_is_one_line(tmp_path: Path, short_waits: None) -> None:
    paths = write_all(tmp_path)
    for path in paths:
        spoil(path)
    lost = "2 of the 3 shards of 'train' cannot be read, more than half; the last: .*train-scenes-0000{}"
    with pytest.raises(UserError, match=lost.format(1)):
        CodeShards(tmp_path, split="train")
    write_all(tmp_path)
    shards = CodeShards(tmp_path, split="train")
    for path in paths[1:]:
        path.unlink()
    with pytest.raises(BadSample):
        shards[5]
    with pytest.raises(UserError, match=lost.format(2)):
        shards[10]


def test_a_shard_that_changed_since_it_was_counted_is_set_aside(tmp_path: Path, short_waits: None) -> None:
    write_all(tmp_path)
    shards = CodeShards(tmp_path, split="train")
    write(tmp_path, shard=2, rows=3)
    with pytest.raises(BadSample, match="holds 3 images of 16 patches, not 5 of 16"):
        shards[12]


def test_thousands_of_shards_are_mapped_when_asked_for(tmp_path: Path) -> None:
    write_all(tmp_path)
    shards = CodeShards(tmp_path, split="train")
    assert len(list((tmp_path / ".arrow").iterdir())) == 1
    assert shards[14].key == "scenes-2-4" and len(list((tmp_path / ".arrow").iterdir())) == 2


def test_images_of_different_sizes_are_refused(tmp_path: Path, short_waits: None) -> None:
    path = write(tmp_path, shard=0, num_shards=1)
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "height", [[4, 4, 4, 4, 2]]).cast(table.schema), path)
    with pytest.raises(UserError, match="damaged"):
        CodeShards(tmp_path, split="train")


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(CodeShards(tmp_path, split="train")) == 15
    assert not (tmp_path / ".arrow").exists()
