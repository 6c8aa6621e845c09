"""Image files in every kind of container: right samples, disjoint splits, bad ones skipped and counted by reason."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_mix.sources.images
import data_mix.sources.webdataset
from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.files import source_kind
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.text import TextSourceConfig, open_text_source
from tests.helpers.image_files import encoded, write_folder, write_parquet, write_shards, write_tar
from um3.core.errors import UserError

Write = Callable[..., None]


def opened(path: Path | str, split: Split = "train", **options: Any) -> ImageSource:
    config = ImageSourceConfig(name="mine", path=str(path), **{"val_fraction": 0.25, **options})
    source = open_image_source(config, split=split, size=12, seed=0)
    assert isinstance(source, ImageSource) and source.name == "mine"
    return source


def read_all(source: ImageSource) -> tuple[list[Sample], Counter[str]]:
    """The usable samples, and the reasons of the others."""
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


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_every_container_gives_all_images_once(write: Write, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    train, val = opened(root), opened(root, "val")
    assert sorted(numbers_of(train) + numbers_of(val)) == list(range(40)) and 2 <= len(val) <= 20
    assert len({sample.key for source in (train, val) for sample in read_all(source)[0]}) == 40
    moved = root.rename(tmp_path / "elsewhere")
    assert numbers_of(opened(moved, "val")) == numbers_of(val)


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_excluded_images_are_in_no_split(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    whole = {split: opened(tmp_path, split) for split in ("train", "val")}
    excluded = [source[1].key for source in whole.values()]
    for split, source in whole.items():
        left = opened(tmp_path, split, exclude=excluded)
        assert [sample.key for sample in left] == [sample.key for sample in source if sample.key not in excluded]
        assert left.fingerprint() != source.fingerprint()
    with pytest.raises(UserError, match=r"exclude has 'a/99\.png', which is the key of no sample"):
        opened(tmp_path, exclude=["a/99.png"])


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_without_captions(tmp_path: Path, write: Write) -> None:
    write(tmp_path, captions=False)
    samples, reasons = read_all(opened(tmp_path, has_captions=False))
    assert len(samples) > 20 and not reasons and {sample.captions for sample in samples} == {("",)}


def test_folder_captions(tmp_path: Path) -> None:
    texts = {"sidecar": b"one\ntwo\n one \n", "both": b"not this", "blank": b" \n\t\n", "latin": b"caf\xe9"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    for name in (*texts, "metadata", "none", "spaced", ".hidden"):
        (tmp_path / f"{name}.png").write_bytes(encoded(1))
    names = {"metadata.png": ["first", "", "second"], "both.png": "from metadata", "./spaced.png": "  a \n b "}
    rows = [{"file_name": name, "text": text} for name, text in (names | {"../outside.png": "never read"}).items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, reasons = read_all(opened(tmp_path, val_fraction=0.0))
    captions = {"sidecar": ("one", "two"), "metadata": ("first", "second"), "both": ("from metadata",)}
    assert {Path(sample.key).stem: sample.captions for sample in samples} == captions | {"spaced": ("a b",)}
    assert reasons == {"no caption": 1, "empty caption": 1, "unreadable caption": 1}


def test_folder_with_split_folders(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / ("train", "train", "val", "test")[number % 4]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(number))
        (folder / f"{number}.txt").write_text(f"number {number}")
    assert sorted(numbers_of(opened(tmp_path))) == [0, 1, 4, 5, 8, 9]
    assert sorted(numbers_of(opened(tmp_path, "val"))) == [2, 6, 10]
    write_folder(tmp_path / "only/val")
    assert len(opened(tmp_path / "only", "val")) == 40
    with pytest.raises(UserError, match="no split is called train"):
        opened(tmp_path / "only")


def test_bad_images_are_counted_by_reason(tmp_path: Path) -> None:
    images = [encoded(1), encoded(1, "JPEG")[:-100], b"<html>", b"", None]
    table = pa.table({"jpg": pa.array(images, pa.binary()), "text": ["a", "b", "c", "d", "e"]})
    pq.write_table(table, tmp_path / "a.parquet")
    samples, reasons = read_all(opened(tmp_path / "a.parquet", val_fraction=0.0))
    assert len(samples) == 1 and reasons == {"truncated": 1, "not an image": 1, "no image": 2}


def test_parquet_types_and_split_column(tmp_path: Path, parquet_in_memory: bool) -> None:
    structs = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(8)]
    captions = [[f"number {number}", f"number {number}", "more"] for number in range(8)]
    columns = {"picture": structs, "captions": captions, "split": ["train", "val", "test", "train"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    train = opened(tmp_path / "a.parquet")
    assert numbers_of(train) == [0, 3, 4, 7] and train[0].captions == ("number 0", "more")
    assert train[0].key == "a.parquet#0"
    assert (tmp_path / "cache").exists() != parquet_in_memory
    assert numbers_of(opened(tmp_path / "*.parquet", "val")) == [1, 5]


def test_parquet_columns_of_the_config(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {
        "thumb": [encoded(9)] * 3,
        "full": [encoded(number) for number in range(3)],
        "title": [f"number {number}" for number in range(3)],
        "id": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), file)
    options: dict[str, Any] = {"image_column": "full", "caption_column": "title", "val_fraction": 0.0}
    assert numbers_of(opened(file, **options)) == [0, 1, 2]
    for setting, value, message in (
        ("image_column", "", "cannot tell the image column among thumb, full, title, id; set image_column"),
        ("caption_column", "", "cannot tell the caption column"),
        ("caption_column", "words", r"no column 'words' \(has: thumb, full, title, id\)"),
        ("image_column", "title", "'title' holds string, not image bytes"),
        ("caption_column", "id", "'id' holds int64, not text"),
    ):
        with pytest.raises(UserError, match=message):
            opened(file, **options | {setting: value})


def test_tar_with_odd_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_mix.sources.webdataset, "MAX_FILE_BYTES", 5000)
    shard = tmp_path / "a.tar"
    names = ("../x.png", "/etc/y.png", "d.i/z.left.PNG", "nocaption.jpg", "blank.png", "badjson.png", "listjson.png")
    members = {name: encoded(number) for number, name in enumerate(names, start=1)}
    members |= {"../x.txt": b"number 1", "/etc/y.json": b'{"caption": "number 2"}', "d.i/z.left.txt": b"number 3"}
    members |= {"blank.txt": b" \n", "badjson.json": b"{", "listjson.json": b"[1]", "noimage.txt": b"alone"}
    members |= {"huge.png": encoded(8) + bytes(6000), "huge.txt": b"number 8", "movie.mp4": b"what"}
    write_tar(shard, members | {"html.jpg": b"<html>", "html.txt": b"x"})
    before = sorted(tmp_path.parent.rglob("*"))
    samples, reasons = read_all(opened(shard, val_fraction=0.0))
    assert [sample.captions[0] for sample in samples] == ["number 1", "number 2", "number 3"]
    assert [int(sample.image_HWC[0, 0, 0]) for sample in samples] == [1, 2, 3]
    assert [sample.key for sample in samples] == ["a.tar#../x", "a.tar#/etc/y", "a.tar#d.i/z.left"]
    expected = {"no caption": 1, "empty caption": 1, "unreadable caption": 2, "too large": 1, "not an image": 1}
    assert reasons == expected
    assert sorted(tmp_path.parent.rglob("*")) == before, "nothing is written"


def test_a_cut_tar_keeps_the_samples_before_the_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:10_400])
    samples, reasons = read_all(opened(shard, val_fraction=0.0))
    assert 3 <= len(samples) < 20 and "damaged" in caplog.text and set(reasons) <= {"truncated", "no caption"}
    with pytest.raises(UserError, match="damaged"):
        opened(shard, skip_bad_files=False)
    write_tar(shard, {"readme.txt": b"hello"})
    with pytest.raises(UserError, match="no sample"):
        opened(shard)


def test_an_unreadable_tar_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(b"no tar at all")
    source = opened(tmp_path, val_fraction=0.0)
    assert sorted(numbers_of(source)) == list(range(20, 40))
    assert [*source.bad_files.reasons] == [tmp_path / "shard-000000.tar"]
    assert "skipping" in caplog.text and "shard-000000.tar" in caplog.text
    for path, options in ((tmp_path, {"skip_bad_files": False}), (tmp_path / "shard-000000.tar", {})):
        with pytest.raises(UserError, match="not an uncompressed tar file"):
            opened(path, **options)


@pytest.mark.parametrize("damage", ["footer", "pages"])
def test_a_damaged_parquet_file_is_skipped(tmp_path: Path, parquet_in_memory: bool, damage: str) -> None:
    write_parquet(tmp_path)
    data = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(data[:-40] if damage == "footer" else data[:4] + bytes(1500) + data[1504:])
    source = opened(tmp_path, val_fraction=0.0)
    assert sorted(numbers_of(source)) == list(range(20)) and [*source.bad_files.reasons] == [tmp_path / "1.parquet"]
    with pytest.raises(UserError, match=r"1\.parquet.*set skip_bad_files=true"):
        opened(tmp_path, skip_bad_files=False)
    (tmp_path / "0.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"source 'mine': cannot read any of its 2 files"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("write", "name", "reasons"),
    [
        (write_folder, "a/01.png", {"cannot be read": 1}),
        (write_shards, "shard-000001.tar", {"unreadable file": 20}),
    ],
)
def test_a_file_that_vanishes_is_counted_or_an_error(
    write: Write, name: str, reasons: dict[str, int], tmp_path: Path
) -> None:
    write(tmp_path)
    skips, stops = (opened(tmp_path, val_fraction=0.0, skip_bad_files=skip) for skip in (True, False))
    (tmp_path / name).unlink()
    assert read_all(skips)[1] == reasons
    with pytest.raises(UserError, match=f"{name}.*set skip_bad_files=true"):
        read_all(stops)


def test_an_absent_owner_and_name_are_of_the_hub_and_two_kinds_of_files_are_refused(tmp_path: Path) -> None:
    for path in ("owner/name", "owner/name:config"):
        assert source_kind(ImageSourceConfig(name="mine", path=path)) == "hub"
    write_parquet(tmp_path)
    write_shards(tmp_path)
    with pytest.raises(UserError, match=r"both \.parquet and \.tar"):
        opened(tmp_path)


IMAGE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "'x' has no path"),
    ({"path": "/absent/folder"}, r"/absent/folder\): there is no such file or folder; give a folder"),
    ({"path": "/absent/a.parquet"}, "no .parquet file at '/absent/a.parquet'"),
    ({"path": "/absent/*.tar"}, "no .tar file at"),
    ({"kind": "folder"}, "kind=folder needs a path"),
    ({"kind": "folder", "path": "/absent"}, "no folder '/absent'"),
    ({"kind": "digits", "path": "/absent"}, "kind=digits takes no path"),
    ({"kind": "scenes", "stream": 3}, "stream=3 is for kind=hub"),
    ({"kind": "scenes"}, "size=8"),
    ({"kind": "scenes", "exclude": ["0"]}, "exclude is not for kind=scenes"),
]
TEXT_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"path": "/absent/file.txt"}, r"no \.txt file at '/absent/file\.txt'"),
    ({"path": "/absent/folder"}, r"there is no such file or folder; give a folder, \.parquet, \.jsonl"),
    ({"kind": "jsonl"}, "kind=jsonl needs a path"),
    ({"kind": "python_docs", "path": "x"}, "takes no path"),
    ({"path": "a.parquet"}, r"no column 'text' \(has: words, number\); set field"),
    ({"path": "a.parquet", "field": "number"}, "'number' holds int64, not text"),
]


@pytest.mark.parametrize(
    ("config", "message"),
    [(ImageSourceConfig(name="x", **options), message) for options, message in IMAGE_MISTAKES]
    + [(TextSourceConfig(name="x", **options), message) for options, message in TEXT_MISTAKES],
)
def test_mistakes_are_one_line(
    config: ImageSourceConfig | TextSourceConfig, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"words": ["a"], "number": [1]}), "a.parquet")
    with pytest.raises(UserError, match=message):
        if isinstance(config, ImageSourceConfig):
            open_image_source(config, split="train", size=8, seed=0)
        else:
            open_text_source(config, split="val")


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.png or \.jpg"):
        opened(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(UserError, match="none of its 1 images has a caption"):
        opened(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "fine"}\n{"name": "b.png"}')
    with pytest.raises(
        UserError, match=r"no JSON object with file_name: 1 .*metadata\.jsonl:2.*names no image: 1.*b\.png"
    ):
        opened(tmp_path)


def test_decoded_images_are_kept_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(data_mix.sources.images, "CACHE_BYTES", 5 * 12 * 12 * 3)
    source = opened(tmp_path, val_fraction=0.0)
    first, second = read_all(source)[0], read_all(source)[0]
    assert sum(a is b for a, b in zip(first, second, strict=True)) == 5
    assert not first[0].image_HWC.flags.writeable, "one reader cannot change an image of another"
    assert [sample.captions for sample in first] == [sample.captions for sample in second]
