"""`make codes` with a tiny tokenizer: the codes are its codes, runs resume, nothing is made twice."""

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from PIL import Image

import tokenizer
from data_mix.codes.encode import main
from data_mix.codes.shards import CodeShards, open_code_sources, read_header
from data_mix.demo.scenes import ScenesSource
from tests.helpers.image_files import write_folder
from tests.helpers.processes import locked
from tests.helpers.tiny_qlip import make_qlip
from um3.core.errors import UserError

SIZE = 24  # of the images that the tokenizer of `make_qlip` takes


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """`main` sets up logging to this test's stderr; the next test must not inherit it."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.fixture(scope="module")
def qlip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qlip(tmp_path_factory.mktemp("qlip"))


def write_images(folder: Path, *, captions: bool = True) -> Path:
    """Forty images; numbers 3 and 8 cannot be read."""
    write_folder(folder, captions=captions)
    for name in ("a/03.png", "b/c/08.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    return folder


def config_file(tmp_path: Path, *, qlip: Path, images: str = "[{name: scenes, length: 50}]") -> Path:
    path = tmp_path / "codes.yaml"
    settings = f"samples_per_shard: 20, batch_size: 8, output_dir: {tmp_path / 'codes'}, images: {images}"
    path.write_text(f"codes: {{visual_tokenizer: {qlip}, {settings}}}\n")
    return path


def run(path: Path, *overrides: str) -> dict[str, dict[str, dict[str, int]]]:
    """Run the command; returns the counts in the summary by split and source."""
    main(["--config", str(path), *overrides])
    return json.loads((path.parent / "codes/summary.json").read_text())["splits"]


def opened(folder: Path, *, source: str = "scenes") -> CodeShards:
    return open_code_sources(folder, split="train")[source]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrow"))}


def test_shards_hold_the_codes_of_the_tokenizer(
    tmp_path: Path, qlip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, qlip=qlip)
    counts = run(path)
    assert counts["train"]["scenes"] == {"samples": 50, "images": 50, "shards": 3, "skipped": {}}
    assert counts["val"]["scenes"]["images"] == len(open_code_sources(tmp_path / "codes", split="val")["scenes"]) == 2
    model, processor = tokenizer.load(qlip)
    shards = opened(tmp_path / "codes")
    assert (len(shards), shards.num_patches, shards.bits, shards.image_size) == (50, 4, 12, SIZE)
    assert shards.fingerprint == model.fingerprint()
    scenes = ScenesSource(size=SIZE, length=50)
    distinct = set()
    for index in (0, 7, 20, 49):
        codes_BN = model.encode(processor.pixels(scenes[index].image_HWC[None]))
        assert torch.equal(shards[index].codes_N, codes_BN[0])
        assert (shards[index].key, shards[index].captions) == (scenes[index].key, scenes[index].captions)
        distinct.add(tuple(codes_BN[0].tolist()))
    assert len(distinct) > 1
    monkeypatch.setattr(tokenizer, "load", lambda folder: pytest.fail("the tokenizer was loaded"))
    run(path)
    run(path, "images=[{name: scenes, length: 50, weight: 3}]", "num_threads=2")
    assert capsys.readouterr().out.count("up to date") == 2


def test_in_bf16_a_few_codes_change_and_are_other_codes(tmp_path: Path, qlip: Path, amx: None) -> None:
    """`auto` is bf16 on a CPU with AMX. What is encoded in the one precision is not up to date in the other."""
    path, codes = config_file(tmp_path, qlip=qlip), tmp_path / "codes"

    def encoded(*overrides: str) -> tuple[torch.Tensor, str]:
        run(path, *overrides)
        stacked = torch.stack([sample.codes_N for sample in opened(codes)])
        return stacked, json.loads((codes / "summary.json").read_text())["precision"]

    (exact, fp32), (mixed, bf16) = encoded(), encoded("precision=auto")
    assert (fp32, bf16) == ("fp32", "bf16-mixed")
    bits = tokenizer.bits.codes_to_bits(exact ^ mixed, num_bits=12)
    assert 0 < bits.float().mean() < 0.01
    finished = shard_bytes(codes)
    shutil.rmtree(codes)
    assert encoded("precision=bf16-mixed")[1] == bf16 and shard_bytes(codes) == finished
    assert torch.equal(encoded()[0], exact)


def test_only_missing_and_damaged_shards_are_made_again(tmp_path: Path, qlip: Path) -> None:
    path, codes = config_file(tmp_path, qlip=qlip), tmp_path / "codes"
    with locked(codes), pytest.raises(UserError, match="another process is writing to"):
        run(path)
    run(path)
    finished = shard_bytes(codes)
    written = (codes / "train-scenes-00000.arrow").stat().st_mtime_ns
    for data in (None, b"cut short", finished["train-scenes-00001.arrow"][:-9]):
        (codes / "train-scenes-00001.arrow").unlink()
        if data:
            (codes / "train-scenes-00001.arrow").write_bytes(data)
        (codes / "val-scenes-00000.arrow.partial").write_bytes(b"half")
        run(path)
        assert shard_bytes(codes) == finished and not list(codes.glob("*.partial"))
    assert (codes / "train-scenes-00000.arrow").stat().st_mtime_ns == written


def test_unusable_images_are_counted_and_new_ones_encoded(tmp_path: Path, qlip: Path) -> None:
    images = write_images(tmp_path / "images")
    path = config_file(tmp_path, qlip=qlip, images=f"[{{name: plain, path: {images}, val_fraction: 0}}]")
    counts = run(path, "samples_per_shard=5")
    assert set(counts) == {"train"}
    plain = counts["train"]["plain"]
    assert (plain["samples"], plain["images"], plain["skipped"]) == (40, 38, {"not an image": 2})
    shards = opened(tmp_path / "codes", source="plain")
    assert {sample.captions[0] for sample in shards} == {f"number {number}" for number in {*range(40)} - {3, 8}}
    for image in images.rglob("*.png"):
        Image.new("RGB", (30, 30), "red").save(image)
    assert run(path)["train"]["plain"]["images"] == 40
    assert not torch.equal(opened(tmp_path / "codes", source="plain")[0].codes_N, shards[0].codes_N)
    for image in images.rglob("*.png"):
        image.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no train image of source 'plain' can be used .*check its files"):
        run(path)


def test_shards_of_another_tokenizer_or_format_are_replaced(
    tmp_path: Path, qlip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = tmp_path / "codes"
    run(config_file(tmp_path, qlip=qlip))
    (codes / "train-old-00000.parquet").write_bytes(b"PAR1")
    other = make_qlip(tmp_path / "other", seed=1)
    run(config_file(tmp_path, qlip=other), "samples_per_shard=30")
    assert "replacing 5 shards of another tokenizer" in capsys.readouterr().err
    names = [f"{name}-scenes-0000{shard}.arrow" for name, shard in (("train", 0), ("train", 1), ("val", 0))]
    assert sorted(path.name for path in codes.iterdir()) == [".lock", "summary.json", *names]
    fingerprint = tokenizer.load(other)[0].fingerprint()
    assert {read_header(path).fingerprint for path in codes.glob("*.arrow")} == {fingerprint}


def test_a_full_disk_stops_the_run_and_costs_no_finished_shard(
    tmp_path: Path, qlip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, codes = config_file(tmp_path, qlip=qlip), tmp_path / "codes"
    run(path)
    finished = shard_bytes(codes)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(pa.ipc, "new_file", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        run(path, "samples_per_shard=30", "images=[{name: digits}]")
    assert shard_bytes(codes) == finished and not (codes / "summary.json").exists()
    run(path)
    assert shard_bytes(codes) == finished


def test_limit_takes_the_first_samples_of_each_source(tmp_path: Path, qlip: Path) -> None:
    splits = run(config_file(tmp_path, qlip=qlip, images="[{name: scenes, length: 50}, {name: digits}]"), "limit=9")
    counts = {split: {name: source["images"] for name, source in kinds.items()} for split, kinds in splits.items()}
    assert counts == {"train": {"scenes": 9, "digits": 9}, "val": {"scenes": 2, "digits": 9}}
    assert opened(tmp_path / "codes")[8].key == ScenesSource(size=SIZE, length=50)[8].key


def test_images_without_captions_are_encoded_for_conversations(tmp_path: Path, qlip: Path) -> None:
    images = write_images(tmp_path / "images", captions=False)
    source = f"[{{name: pictures, path: {images}, has_captions: false, val_fraction: 0}}]"
    splits = run(config_file(tmp_path, qlip=qlip, images=source))
    assert splits["train"]["pictures"]["images"] == 38 and splits["train"]["pictures"]["skipped"]
    coded = open_code_sources(tmp_path / "codes", split="train")["pictures"]
    assert list(coded.each_key()) == [(index, coded[index].key) for index in range(38)]
    assert {Path(sample.key).name for sample in coded} == {f"{number:02d}.png" for number in {*range(40)} - {3, 8}}
    assert coded[0].captions == ("",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("visual_tokenizer=absent", "'absent'; run make stage2 first"),
        ("images=[]", "'images' is empty"),
        ("images=[{name: scenes}, {name: scenes}]", "two image sources have the name 'scenes'"),
        ("images=[{name: a/b, kind: scenes}]", "use letters, digits"),
        ("visual_tokenizer=wide", "codes of 40 bits; shards hold at most 32"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, qlip: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_qlip(tmp_path / "wide", bits=40)
    with pytest.raises(UserError, match=message):
        run(config_file(tmp_path, qlip=qlip), override)


def test_a_hub_id_is_not_looked_for_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "load", load := Mock(side_effect=UserError("asked the hub")))
    with pytest.raises(UserError, match="asked the hub"):
        run(config_file(tmp_path, qlip=Path("owner/qlip-tiny")))
    load.assert_called_with("owner/qlip-tiny")


def test_a_tokenizer_may_have_its_weights_in_shards(tmp_path: Path, qlip: Path) -> None:
    model, processor = tokenizer.load(qlip)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "sharded")
    assert not (tmp_path / "sharded/model.safetensors").exists()
    run(config_file(tmp_path, qlip=qlip), "limit=8")
    whole = shard_bytes(tmp_path / "codes")
    run(config_file(tmp_path, qlip=tmp_path / "sharded"), "limit=8", f"output_dir={tmp_path}/more")
    assert shard_bytes(tmp_path / "more") == whole
