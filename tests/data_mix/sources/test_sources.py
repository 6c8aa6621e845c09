"""Own images from every kind of container: right samples, disjoint splits, bad ones counted by reason."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_mix.sources.image_folder
import data_mix.sources.tables
import data_mix.sources.webdataset
from data_mix.batches.image_batches import ImageBatches
from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.fingerprint import origin
from data_mix.sources.image_folder import DecodedCache, TableImages
from data_mix.sources.image_sources import ImageSourceConfig, image_kind, open_image_source
from data_mix.sources.webdataset import WebDatasetImages
from um3.core.errors import UserError


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A plain image that tells its number by its red channel."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 0, 255)).save(buffer, kind)
    return buffer.getvalue()


def opened(path: Path | str, split: Split = "train", **options: Any) -> ImageSource:
    config = ImageSourceConfig(name="mine", path=str(path), **{"val_fraction": 0.25, **options})
    source = open_image_source(config, split=split, size=12, seed=0)
    assert isinstance(source, ImageSource) and source.name == "mine"
    return source


def read_all(source: ImageSource) -> tuple[list[Sample], Counter[str]]:
    samples, reasons = [], Counter[str]()
    for index in range(len(source)):
        try:
            samples.append(source[index])
        except BadSample as error:
            reasons[error.reason] += 1
    return samples, reasons


def numbers_of(source: ImageSource) -> list[int]:
    samples, reasons = read_all(source)
    assert not reasons
    for sample in samples:
        assert sample.image_HWC.shape == (12, 12, 3) and sample.image_HWC.dtype == np.uint8
        assert sample.captions[0] == f"number {sample.image_HWC[6, 6, 0]}"
    return [int(sample.image_HWC[6, 6, 0]) for sample in samples]


def write_folder(root: Path) -> None:
    for number in range(40):
        folder = root / ("a" if number % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(encoded(number))
        (folder / f"{number:02d}.txt").write_text(f"number {number}\n\nalso {number}\n")


def write_parquet(root: Path) -> None:
    for part in range(2):
        numbers = range(part * 20, part * 20 + 20)
        columns = {
            "id": list(numbers),
            "image": [encoded(number) for number in numbers],
            "caption": [f"number {number}" for number in numbers],
        }
        pq.write_table(pa.table(columns), root / f"{part}.parquet")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(root: Path) -> None:
    for part in range(2):
        members = {}
        for number in range(part * 20, part * 20 + 20):
            members[f"{number:03d}.png"] = encoded(number)
            members[f"{number:03d}.txt"] = f"number {number}".encode()
        write_tar(root / f"shard-{part:06d}.tar", members)


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_every_container_gives_all_images_once(write: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    train, val = opened(root), opened(root, "val")
    numbers = numbers_of(train) + numbers_of(val)
    assert sorted(numbers) == list(range(40)) and 2 <= len(val) <= 20
    keys = {sample.key for source in (train, val) for sample in read_all(source)[0]}
    assert len(keys) == 40
    moved = root.rename(tmp_path / "elsewhere")
    assert numbers_of(opened(moved, "val")) == numbers_of(val)
    with pytest.raises(IndexError):
        train[len(train)]


def test_folder_captions(tmp_path: Path) -> None:
    for name in ("sidecar", "metadata", "both", "none", "blank", "latin", "spaced"):
        (tmp_path / f"{name}.png").write_bytes(encoded(1))
    (tmp_path / "sidecar.txt").write_text("one\ntwo\n one \n")
    (tmp_path / "both.txt").write_text("not this")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden.png").write_bytes(encoded(1))
    rows: list[dict[str, Any]] = [
        {"file_name": "metadata.png", "captions": ["first", "", "second"]},
        {"file_name": "both.png", "caption": "from metadata"},
        {"file_name": "./spaced.png", "text": "  a \n b "},
        {"file_name": "../outside.png", "text": "never read"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    samples, reasons = read_all(opened(tmp_path, val_fraction=0.0))
    assert {sample.key: sample.captions for sample in samples} == {
        "sidecar.png": ("one", "two"),
        "metadata.png": ("first", "second"),
        "both.png": ("from metadata",),
        "spaced.png": ("a b",),
    }
    assert reasons == {"no caption": 1, "empty caption": 1, "unreadable caption": 1}


def test_folder_with_split_folders(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / ("train", "train", "val", "test")[number % 4]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(number))
        (folder / f"{number}.txt").write_text(f"number {number}")
    assert sorted(numbers_of(opened(tmp_path))) == [0, 1, 4, 5, 8, 9]
    assert sorted(numbers_of(opened(tmp_path, "val"))) == [2, 6, 10]


def test_bad_images_are_counted_by_reason(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    images = [encoded(1), buffer.getvalue()[:900], b"<html>", b"", None]
    table = pa.table({"jpg": pa.array(images, pa.binary()), "text": ["a", "b", "c", "d", "e"]})
    pq.write_table(table, tmp_path / "a.parquet")
    samples, reasons = read_all(opened(tmp_path / "a.parquet", val_fraction=0.0))
    assert len(samples) == 1
    assert reasons == {"truncated": 1, "not an image": 1, "no image": 2}


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_types_and_split_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    if not in_memory:
        monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    structs = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(8)]
    captions = [[f"number {number}", f"number {number}", "more"] for number in range(8)]
    columns = {"picture": structs, "captions": captions, "split": ["train", "val", "test", "train"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    train = opened(tmp_path / "a.parquet")
    assert numbers_of(train) == [0, 3, 4, 7] and train[0].captions == ("number 0", "more")
    assert train[0].key == "a.parquet#0"
    assert (tmp_path / "cache").exists() != in_memory
    assert numbers_of(opened(tmp_path / "*.parquet", "val")) == [1, 5]


def test_parquet_columns_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {
        "thumb": [encoded(9)] * 3,
        "full": [encoded(number) for number in range(3)],
        "title": [f"number {number}" for number in range(3)],
        "id": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), file)
    given: dict[str, Any] = {"image_column": "full", "caption_column": "title", "val_fraction": 0.0}
    assert numbers_of(opened(file, **given)) == [0, 1, 2]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"image_column": ""}, "cannot tell the image column among thumb, full, title, id; set image_column"),
        ({"caption_column": ""}, "cannot tell the caption column"),
        ({"caption_column": "words"}, r"no column 'words' \(has: thumb, full, title, id\)"),
        ({"image_column": "title"}, "'title' holds string, not image bytes"),
        ({"caption_column": "id"}, "'id' holds int64, not text"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            opened(file, **{**given, **change})


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_files_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    if not in_memory:
        monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path)
    pq.write_table(pa.table({"image": [encoded(1)], "words": ["x"]}), tmp_path / "2.parquet")
    with pytest.raises(UserError, match=r"source 'mine': .*caption"):
        opened(tmp_path)


def test_tar_with_odd_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_mix.sources.webdataset, "MAX_FILE_BYTES", 5000)
    shard = tmp_path / "a.tar"
    write_tar(
        shard,
        {
            "../x.png": encoded(1),
            "../x.txt": b"number 1",
            "/etc/y.png": encoded(2),
            "/etc/y.json": json.dumps({"caption": "number 2", "width": 20}).encode(),
            "d.i/z.left.PNG": encoded(3),
            "d.i/z.left.txt": b"number 3",
            "nocaption.jpg": encoded(4),
            "blank.png": encoded(5),
            "blank.txt": b" \n",
            "badjson.png": encoded(6),
            "badjson.json": b"{",
            "listjson.png": encoded(6),
            "listjson.json": b"[1]",
            "huge.png": encoded(7) + bytes(6000),
            "huge.txt": b"number 7",
            "noimage.txt": b"alone",
            "movie.mp4": b"what",
            "html.jpg": b"<html>",
            "html.txt": b"x",
        },
    )
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    samples, reasons = read_all(opened(shard, val_fraction=0.0))
    assert [sample.captions[0] for sample in samples] == ["number 1", "number 2", "number 3"]
    assert [int(sample.image_HWC[0, 0, 0]) for sample in samples] == [1, 2, 3]
    assert [sample.key for sample in samples] == ["a.tar#../x", "a.tar#/etc/y", "a.tar#d.i/z"]
    assert reasons == {
        "no caption": 1,
        "empty caption": 2,
        "unreadable caption": 1,
        "too large": 1,
        "not an image": 1,
    }
    assert sorted(tmp_path.parent.rglob("*")) == before, "nothing is written"


def test_a_cut_tar_keeps_what_lies_before(tmp_path: Path, caplog: pytest.LogCaptureFixture, short_waits: None) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:10_400])
    samples, reasons = read_all(opened(shard, val_fraction=0.0))
    assert 3 <= len(samples) < 20 and "damaged" in caplog.text
    assert set(reasons) <= {"truncated", "no caption"}
    shard.write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="no uncompressed tar file"):
        opened(shard)
    write_tar(shard, {"readme.txt": b"hello"})
    with pytest.raises(UserError, match="no image"):
        opened(shard)


def test_a_tar_that_cannot_be_opened_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, short_waits: None
) -> None:
    write_shards(tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(b"no tar at all")
    source = opened(tmp_path, val_fraction=0.0)
    assert sorted(numbers_of(source)) == list(range(20, 40))
    assert isinstance(source, WebDatasetImages) and [file.name for file in source.set_aside.reasons] == [
        "shard-000000.tar"
    ]
    assert "set aside" in caplog.text and "shard-000000.tar" in caplog.text


def test_a_tar_that_vanishes_is_replaced_by_the_others(tmp_path: Path, short_waits: None) -> None:
    """Stage 1's reader takes the next usable sample; what was passed over is counted under its reason."""
    write_shards(tmp_path)
    batches = ImageBatches([opened(tmp_path, val_fraction=0.0)], batch_size=20, seed=0)
    (tmp_path / "shard-000001.tar").unlink()
    batch = batches.batch(0)
    assert {key.partition("#")[0] for key in batch.keys} == {"shard-000000.tar"}
    assert len(batch.keys) == 20 and set(batch.skipped) == {("mine", "shard set aside")}
    assert batch.skipped["mine", "shard set aside"] >= 5


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("damage", ["footer", "pages"])
def test_a_damaged_parquet_file_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None, in_memory: bool, damage: str
) -> None:
    if not in_memory:
        monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "data"
    root.mkdir()
    write_parquet(root)
    data = (root / "1.parquet").read_bytes()
    (root / "1.parquet").write_bytes(data[:-40] if damage == "footer" else data[:4] + bytes(1500) + data[1504:])
    source = opened(root, val_fraction=0.0)
    assert sorted(numbers_of(source)) == list(range(20))
    assert isinstance(source, TableImages) and [file.name for file in source.set_aside.reasons] == ["1.parquet"]
    (root / "0.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"source 'mine': cannot read parquet"):
        opened(root)


def test_drawn_sources_by_name() -> None:
    for name in ("scenes", "digits"):
        source = open_image_source(ImageSourceConfig(name=name, length=100), split="val", size=32, seed=3)
        assert source.name == name and source[0].image_HWC.shape == (32, 32, 3)
    renamed = ImageSourceConfig(name="more", kind="scenes", length=100)
    assert len(open_image_source(renamed, split="train", size=32, seed=3)) == 100
    assert len(open_image_source(renamed, split="val", size=32, seed=3)) == 5
    with pytest.raises(UserError, match="source 'scenes': size=8"):
        open_image_source(ImageSourceConfig(), split="train", size=8, seed=0)


def test_auto_kind(tmp_path: Path) -> None:
    def kind(path: Path | str) -> str:
        return image_kind(ImageSourceConfig(name="mine", path=str(path)))

    assert kind("owner/name") == kind("owner/name:config") == "hub"
    assert kind(tmp_path) == "folder"
    assert kind(tmp_path / "x-*.tar") == "webdataset" and kind("a/b.parquet") == "parquet"
    write_parquet(tmp_path)
    assert kind(tmp_path) == "parquet"
    write_shards(tmp_path)
    with pytest.raises(UserError, match=r"both \.parquet and \.tar; set kind"):
        kind(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImageSourceConfig(name="x"), "'x' has no path"),
        (ImageSourceConfig(name="x", path="/absent/folder"), "'/absent/folder' is no folder"),
        (ImageSourceConfig(name="x", path="/absent/a.parquet"), "no .parquet file at '/absent/a.parquet'"),
        (ImageSourceConfig(name="x", path="/absent/*.tar"), "no .tar file at"),
        (ImageSourceConfig(name="x", kind="folder"), "kind=folder needs a path"),
        (ImageSourceConfig(name="x", kind="folder", path="/absent"), "no folder at '/absent'"),
        (ImageSourceConfig(name="x", kind="digits", path="/absent"), "kind=digits takes no path"),
        (ImageSourceConfig(val_fraction=-0.1), "val_fraction=-0.1"),
    ],
)
def test_mistakes_are_one_line(config: ImageSourceConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_image_source(config, split="train", size=32, seed=0)
    assert "\n" not in str(caught.value)


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image in it"):
        opened(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(UserError, match="none of its 1 images has a caption"):
        opened(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n{"name": "b.png"}')
    with pytest.raises(UserError, match=r"metadata\.jsonl:2 is no JSON object with file_name"):
        opened(tmp_path)


def test_decoded_images_are_cached_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    used_before = DecodedCache._used_bytes
    monkeypatch.setattr(data_mix.sources.image_folder, "CACHE_BYTES", used_before + 5 * 12 * 12 * 3)
    source = opened(tmp_path, val_fraction=0.0)
    first, second = read_all(source)[0], read_all(source)[0]
    assert sum(a is b for a, b in zip(first, second, strict=True)) == 5
    assert not first[0].image_HWC.flags.writeable, "what is shared cannot be changed by one reader"
    assert [sample.captions for sample in first] == [sample.captions for sample in second]
    del source
    assert DecodedCache._used_bytes == used_before


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_images_without_captions_are_taken_where_none_is_read(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    for file in tmp_path.rglob("*.txt"):
        file.unlink()
    source = opened(tmp_path, has_captions=False)
    samples, reasons = read_all(source)
    assert len(samples) > 20 and not reasons and {sample.captions for sample in samples} == {("",)}


def test_a_table_of_images_alone_needs_no_caption_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(number) for number in range(40)]}), tmp_path / "images.parquet")
    with pytest.raises(UserError, match="cannot tell the caption column"):
        opened(tmp_path)
    assert len(read_all(opened(tmp_path, has_captions=False))[0]) > 20


def test_a_folder_of_validation_images_alone_serves_val(tmp_path: Path) -> None:
    write_folder(tmp_path / "val")
    assert len(opened(tmp_path, split="val")) == 40
    with pytest.raises(UserError, match="no part is called train"):
        opened(tmp_path, split="train")


def test_an_image_that_moves_between_folders_makes_other_data(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config = ImageSourceConfig(name="mine", path=str(tmp_path))
    before = origin(config)
    assert origin(config) == before
    (tmp_path / "a/01.png").rename(tmp_path / "b/01.png")
    assert origin(config) != before
