"""`make codes` with a tiny tokenizer: the codes are its codes, runs resume, nothing is made twice."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer
from data_mix.codes.encode import EncodeConfig, encode, main
from data_mix.codes.shards import CodeShards, read_header
from data_mix.demo.scenes import ScenesSource
from data_mix.sources.image_sources import ImageSourceConfig
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError, run_main

SIZE = 24
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 12,
    "rope_pretrained_grid": 2,
}


def make_qlip(folder: Path, *, seed: int = 0, bits: int = 12) -> Path:
    torch.manual_seed(seed)
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = QLIPConfig(
        vision_config=TOWER | {"quantizer_cfg": {"embed_dim": bits, "group_size": 1}},
        decoder_config=TOWER,
        text_config=text | {"num_attention_heads": 2, "max_position_embeddings": 8},
        projection_dim=8,
        initializer_range=0.2,
    )
    QLIPModel(config).save_pretrained(folder)
    QLIPProcessor(None, image_size=SIZE, max_text_tokens=8).save_pretrained(folder)
    return folder


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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve pictures, two of which cannot be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        pixels_HWC = np.random.default_rng(number).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"noise number {number}")
    for number in (3, 8):
        (folder / f"{number:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    return folder


def config_file(tmp_path: Path, *, qlip: Path, images: str = "[{name: scenes, length: 50}]") -> Path:
    path = tmp_path / "codes.yaml"
    path.write_text(
        f"visual_tokenizer: {qlip}\noutput_dir: {tmp_path / 'codes'}\nimages: {images}\nrows_per_shard: 20\nbatch_size: 8\n"
    )
    return path


def run(path: Path, *overrides: str) -> None:
    main(["--config", str(path), *overrides])


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_shards_hold_the_tokenizers_own_codes(tmp_path: Path, qlip: Path) -> None:
    run(config_file(tmp_path, qlip=qlip))
    model, processor = tokenizer.load(qlip)
    shards = CodeShards(tmp_path / "codes", split="train", expected_fingerprint=model.fingerprint())
    assert (len(shards), shards.num_patches, shards.bits, shards.image_size) == (50, 4, 12, SIZE)
    scenes = ScenesSource(size=SIZE, length=50)
    distinct = set()
    for index in (0, 7, 20, 49):
        codes_BN = model.encode(processor.pixels(scenes[index].image_HWC[None]))
        assert torch.equal(shards[index].codes_N, codes_BN[0])
        assert (shards[index].key, shards[index].captions) == (scenes[index].key, scenes[index].captions)
        distinct.add(tuple(codes_BN[0].tolist()))
    assert len(distinct) > 1
    summary = json.loads((tmp_path / "codes" / "summary.json").read_text())
    assert summary["splits"]["train"]["scenes"] == {"samples": 50, "images": 50, "shards": 3, "skipped": {}}
    assert summary["splits"]["val"]["scenes"]["images"] == len(CodeShards(tmp_path / "codes", split="val")) == 2
    assert summary["fingerprint"] == model.fingerprint()


def test_a_second_run_is_up_to_date_without_loading_the_tokenizer(
    tmp_path: Path, qlip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, qlip=qlip)
    run(path)
    monkeypatch.setattr(tokenizer, "load", lambda folder: pytest.fail("the tokenizer was loaded"))
    run(path)
    assert "up to date" in capsys.readouterr().out
    run(path, "images=[{name: scenes, length: 50, weight: 3}]", "num_threads=2")
    assert "up to date" in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped_with_the_same_bytes(tmp_path: Path, qlip: Path) -> None:
    path = config_file(tmp_path, qlip=qlip)
    run(path)
    codes = tmp_path / "codes"
    undisturbed = shard_bytes(codes)
    kept = codes / "train-scenes-00000.parquet"
    made = kept.stat().st_mtime_ns
    (codes / "train-scenes-00001.parquet").unlink()
    (codes / "train-scenes-00002.parquet").write_bytes(b"cut short")
    (codes / "val-scenes-00000.parquet.partial").write_bytes(b"half")
    run(path)
    assert shard_bytes(codes) == undisturbed
    assert kept.stat().st_mtime_ns == made
    assert not list(codes.glob("*.partial"))


def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path: Path, qlip: Path) -> None:
    path = config_file(tmp_path, qlip=qlip, images="[{name: scenes, length: 400}]")
    codes = tmp_path / "codes"
    command = [sys.executable, "-m", "data_mix.codes.encode", "--config", str(path), "batch_size=4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while len(list(codes.glob("*.parquet"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = shard_bytes(codes)
    assert 2 <= len(finished) < 21
    with pytest.raises(UserError, match="run make codes to finish them"):
        CodeShards(codes, split="train")
    run(path, "batch_size=4")
    resumed = shard_bytes(codes)
    assert resumed.items() >= finished.items()
    run(path, "batch_size=4", f"out={tmp_path / 'undisturbed'}")
    assert shard_bytes(tmp_path / "undisturbed") == resumed


def test_unusable_images_are_counted_with_their_reason(tmp_path: Path, qlip: Path, pictures: Path) -> None:
    images = f"[{{name: noise, path: {pictures}, val_fraction: 0}}]"
    run(config_file(tmp_path, qlip=qlip, images=images), "samples_per_shard=5")
    shards = CodeShards(tmp_path / "codes", split="train")
    assert len(shards) == 10
    assert {shards[i].captions[0] for i in range(10)} == {f"noise number {i}" for i in range(12) if i not in (3, 8)}
    counts = json.loads((tmp_path / "codes" / "summary.json").read_text())["splits"]
    assert set(counts) == {"train"}
    assert (counts["train"]["noise"]["samples"], counts["train"]["noise"]["images"]) == (12, 10)
    assert sum(counts["train"]["noise"]["skipped"].values()) == 2
    for picture in pictures.glob("*.png"):
        picture.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no train image of source 'noise' can be used: "):
        run(config_file(tmp_path, qlip=qlip, images=images))


def test_new_pictures_under_the_old_path_are_encoded(tmp_path: Path, qlip: Path, pictures: Path) -> None:
    path = config_file(tmp_path, qlip=qlip, images=f"[{{name: noise, path: {pictures}, val_fraction: 0}}]")
    run(path)
    before = CodeShards(tmp_path / "codes", split="train")[0].codes_N
    for picture in pictures.glob("*.png"):
        Image.new("RGB", (30, 30), "red").save(picture)
    run(path)
    after = CodeShards(tmp_path / "codes", split="train")
    assert len(after) == 12
    assert not torch.equal(after[0].codes_N, before)


def test_another_tokenizers_shards_are_made_anew(
    tmp_path: Path, qlip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config_file(tmp_path, qlip=qlip))
    other = make_qlip(tmp_path / "other", seed=1)
    run(config_file(tmp_path, qlip=other), "samples_per_shard=30")
    codes = tmp_path / "codes"
    assert "4 shards of another tokenizer or config are made anew" in capsys.readouterr().err
    assert sorted(shard_bytes(codes)) == [
        f"{name}-scenes-0000{i}.parquet" for name, i in (("train", 0), ("train", 1), ("val", 0))
    ]
    fingerprint = tokenizer.load(other)[0].fingerprint()
    assert {read_header(path).fingerprint for path in codes.glob("*.parquet")} == {fingerprint}


def test_limit_takes_the_first_samples_of_each_source(tmp_path: Path, qlip: Path) -> None:
    images = [ImageSourceConfig(name="scenes", length=50), ImageSourceConfig(name="digits")]
    summary = encode(
        EncodeConfig(qlip=str(qlip), out=str(tmp_path), images=images, limit=9, batch_size=4), request="test"
    )
    counts = {
        split: {name: source["images"] for name, source in kinds.items()} for split, kinds in summary["splits"].items()
    }
    assert counts == {"train": {"scenes": 9, "digits": 9}, "val": {"scenes": 2, "digits": 9}}


def test_mistakes_are_one_line(tmp_path: Path, qlip: Path) -> None:
    with pytest.raises(UserError, match="run make stage2 first"):
        run(config_file(tmp_path, qlip=tmp_path / "absent"))
    with pytest.raises(UserError, match="names no source"):
        run(config_file(tmp_path, qlip=qlip, images="[]"))
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        run(config_file(tmp_path, qlip=qlip), "batch_size=0")
    with pytest.raises(UserError, match="two image sources are called 'scenes'"):
        run(config_file(tmp_path, qlip=qlip, images="[{name: scenes}, {name: scenes}]"))
    with pytest.raises(UserError, match="use letters, digits"):
        run(config_file(tmp_path, qlip=qlip, images="[{name: a/b, kind: scenes}]"))
    with pytest.raises(UserError, match="codes of 40 bits; shards hold at most 32"):
        run(config_file(tmp_path, qlip=make_qlip(tmp_path / "wide", bits=40)))


def test_a_tokenizer_of_the_hub_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not here to be hashed before they are fetched."""

    def ask(name: str) -> None:
        raise UserError(f"the hub was asked for {name}")

    monkeypatch.setattr(tokenizer, "load", ask)
    with pytest.raises(UserError, match="the hub was asked for owner/qlip-tiny"):
        run(config_file(tmp_path, qlip=Path("owner/qlip-tiny")))


def test_before_stage_2_the_command_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(lambda: run(config_file(tmp_path, qlip=tmp_path / "none")))
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: there is no visual tokenizer in '{tmp_path / 'none'}'; run make stage2 first, or set qlip to one"
    ]
