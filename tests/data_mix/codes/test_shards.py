"""Code shards: the round trip, and every way in which a folder of shards can be wrong."""

import dataclasses
import os
import random
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_mix.codes import shards
from data_mix.codes.shards import CodeShards, ShardHeader, open_code_sources, read_header, write_shard
from data_mix.samples import BadSample
from data_mix.sources import bad_files
from tests.helpers.code_shards import random_codes, write_codes
from um3.core.errors import UserError


def write_all(folder: Path, *, num_shards: int = 3, **changes: Any) -> list[Path]:
    return [write_codes(folder, shard=shard, num_shards=num_shards, **changes) for shard in range(num_shards)]


def opened(folder: Path, source: str = "scenes") -> CodeShards:
    return open_code_sources(folder, split="train")[source]


def test_round_trip_by_index(tmp_path: Path) -> None:
    sizes = (5, 0, 3)
    for shard, num_images in enumerate(sizes):
        write_codes(tmp_path, shard=shard, num_shards=3, num_images=num_images)
    source = open_code_sources(tmp_path, split="train", expected_fingerprint="f" * 64)["scenes"]
    assert (len(source), source.num_patches, source.bits, source.image_size) == (8, 16, 28, 32)
    for sample, (shard, row) in zip(source, [*((0, r) for r in range(5)), *((2, r) for r in range(3))], strict=True):
        assert (sample.key, sample.codes_N.dtype) == (f"scenes-{shard}-{row}", torch.int64)
        assert torch.equal(sample.codes_N, torch.from_numpy(random_codes(shard, num_images=sizes[shard])[row]))
        assert sample.captions[0] == f"caption {row}" and len(sample.captions) == 1 + row % 2


def test_a_shard_is_one_arrow_file_with_its_header(tmp_path: Path) -> None:
    path = write_codes(tmp_path, plan="p", skipped={"cannot be decoded": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["train-scenes-00000.arrow"]
    batch = pa.ipc.open_file(path).get_batch(0)
    assert batch.schema.names == ["key", "codes", "captions"] and batch["codes"].type == pa.list_(pa.uint32(), 16)
    assert np.array_equal(np.stack(batch["codes"].to_numpy(zero_copy_only=False)), random_codes(0, num_images=5))
    header = read_header(path)
    assert header.skipped == {"cannot be decoded": 2} and (header.num_images, header.num_patches) == (5, 16)
    before = path.read_bytes()
    opened(tmp_path)[4]
    write_codes(tmp_path, plan="p", skipped={"cannot be decoded": 2})
    assert path.read_bytes() == before, "the same codes give the same bytes"
    assert len(list(tmp_path.iterdir())) == 1, "reading makes no copy"


def test_32_bit_codes_survive_and_more_are_refused(tmp_path: Path) -> None:
    header = ShardHeader("f", bits=32, image_size=32, split="train", source="scenes")
    content: dict[str, Any] = {"keys": ["k"], "codes_BN": np.array([[2**32 - 1, 0, 2**31, 5]]), "captions": [["c"]]}
    write_shard(tmp_path / "train-scenes-00000.arrow", header=header, **content)
    assert opened(tmp_path)[0].codes_N.tolist() == content["codes_BN"][0].tolist()
    for bits, message in ((33, "33 bits"), (28, "outside 28 bits")):
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "y.arrow", header=dataclasses.replace(header, bits=bits), **content)


def refused(folder: Path, message: str, **options: Any) -> None:
    """Opening fails with one line that names the problem and the remedy."""
    with pytest.raises(UserError, match=message):
        open_code_sources(folder, split="train", **options)


def test_missing_shards_are_noticed(tmp_path: Path) -> None:
    refused(tmp_path, "no train codes in .* run make codes")
    write_all(tmp_path)[1].unlink()
    refused(tmp_path, "'scenes' is incomplete, 2 train shards of 3; run make codes")
    write_codes(tmp_path, shard=1, num_shards=3, plan="another")
    refused(tmp_path, "'scenes' is incomplete")
    write_all(tmp_path, num_images=0)
    refused(tmp_path, "hold no image")


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write_all(tmp_path)[1]
    for content in (b"", b"ARROW1 nonsense ARROW1", path.read_bytes()[:2000]):
        path.write_bytes(content)
        refused(tmp_path, r"train-scenes-00001.arrow is damaged .*delete it and run make codes")
    with pa.ipc.new_file(str(path), pa.schema({"a": pa.int32()})):
        pass
    refused(tmp_path, r"train-scenes-00001.arrow is not a code shard")


@pytest.mark.parametrize(
    "header",
    ["[]", "[" * 100_000, "{}", '{"num_patches": 1e400}', '{"bits": "28"}', '{"skipped": 3}', '{"split": "test"}'],
)
def test_odd_headers_are_one_line(header: str, tmp_path: Path) -> None:
    path = write_codes(tmp_path)
    text = header.replace("{", '{"fingerprint": "f", "image_size": 32, ').replace(", }", "}").encode()
    metadata = {shards.METADATA_KEY: text, shards.CHECKSUM_KEY: str(zlib.crc32(text))}
    with pa.ipc.new_file(str(path), pa.schema([("key", pa.string())], metadata=metadata)):
        pass
    refused(tmp_path, r"train-scenes-00000\.arrow is not a code shard")


def test_captions_and_folders_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "codes [1]*"
    write_codes(folder, captions=lambda row: [f"half a \ud83d pair {row}"])
    (folder / "._train-scenes-00000.arrow").write_bytes(b"of another system")
    assert opened(folder)[3].captions == ("half a \ufffd pair 3",)
    (folder / "train-scenes-00000.arrow").rename(folder / "train-scenes-00000 copy.arrow")
    refused(folder, r"copy of train-scenes-00000\.arrow")


def test_codes_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path)
    refused(tmp_path, f"{'f' * 64}.*{'e' * 64}", expected_fingerprint="e" * 64)
    for change in ({"fingerprint": "e" * 64}, {"bits": 30}, {"image_size": 64}, {"num_patches": 4}):
        write_codes(tmp_path, shard=2, num_shards=3, **change)
        refused(tmp_path, f"differ in {next(iter(change))}")


def test_a_shard_that_cannot_be_read_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    paths = write_all(tmp_path, num_shards=7)
    data = paths[1].read_bytes()
    paths[1].write_bytes(data.replace(b"scenes-1-0", b"scenes-1-9"))
    source = opened(tmp_path)
    assert len(source) == 35 and source[0].key == "scenes-0-0" and source[25].key == "scenes-5-0"
    paths[4].unlink()
    os.truncate(paths[5], 64)
    write_codes(tmp_path, shard=6, num_shards=7, num_images=3)
    for index in (5, 9, 20, 24, 25):
        with pytest.raises(BadSample, match=r"damaged|No such file"):
            source[index]
    with pytest.raises(UserError, match=r"4 of the 7 .*00006\.arrow changed"):
        source[30]
    assert list(source.bad_files.reasons) == [paths[number] for number in (1, 4, 5, 6)]
    assert [f"{number:05d}" in caplog.text for number in range(5)] == [False, True, False, False, True]
    assert caplog.text.count("trying again") == 3 + len(bad_files.RETRY_WAITS_S), "once, not at every sample"
    assert source[4].key == "scenes-0-4"


def content(folder: Path) -> list[Any]:
    return [(sample.key, sample.codes_N.tolist(), sample.captions) for sample in opened(folder)]


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path = write_codes(tmp_path)
    data, expected, refused = path.read_bytes(), content(tmp_path), 0
    draw = random.Random(1)
    for _ in range(150):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert content(tmp_path) == expected
        except UserError as error:
            assert path.name in str(error) and "run make codes" in str(error)
            refused += 1
    assert refused > 75


def test_a_temporary_failure_skips_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_all(tmp_path)
    source = opened(tmp_path)
    away = paths[1].rename(tmp_path / "away")
    monkeypatch.setattr(bad_files, "RETRY_WAITS_S", (0.01, 0.1, 5.0))
    threading.Timer(0.05, away.rename, [paths[1]]).start()
    assert source[7].key == "scenes-1-2" and not source.bad_files.reasons


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files the Linux way")
def test_mapped_shards_are_not_open_files(tmp_path: Path) -> None:
    write_all(tmp_path, num_shards=30, num_images=1)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    source = opened(tmp_path)
    assert [source[index].key for index in range(30)] == [f"scenes-{index}-0" for index in range(30)]
    assert len(list(Path("/proc/self/fd").iterdir())) < num_open + 10
