"""The rule of `data_mix.sources.files` on every reader: files, names, lines, texts, records, pairs and counts."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_mix.sources.config import ImageSourceConfig, TextSourceConfig
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.image_sources import open_image_source
from data_mix.sources.text import open_text_source, readable_texts
from tests.data_mix.sources import test_sources
from tests.data_mix.sources.test_sources import read_all
from tests.helpers.image_files import encoded, write_tar
from um3.core.errors import UserError

# A dotted name, line separators inside a caption, several captions, half a surrogate pair, a null, and another type.
NAMES = [f"at 10.{number}" for number in range(6)]
CAPTIONS: list[Any] = ["zero", "a\u2028b\x0cc\x85d", ["one", "two"], "cup \ud83d", None, {"not": "text"}]
READ = [("zero",), ("a b c d",), ("one", "two"), ("cup \ufffd",)]
HALF_PAIR = 3


def write_lines(file: Path, records: list[Any]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_reader(reader: str, folder: Path) -> dict[str, Any]:
    """Write NAMES and CAPTIONS into `folder` for a reader; return the settings of the source."""
    above, pairs = folder.parent, list(zip(NAMES, CAPTIONS, strict=True))
    lists = [caption if isinstance(caption, list) else [caption] for caption in CAPTIONS]
    column = [*lists[:HALF_PAIR], ["cup \ufffd"], None, None]  # what UTF-8 can hold
    if reader in ("parquet", "hub", "hub stream"):
        images = [encoded(number) for number in range(len(NAMES))]
        pq.write_table(pa.table({"image": images, "caption": column}), folder / "0.parquet")
        (folder / "._0.parquet").write_bytes(b"of macOS")
        return {}
    if reader == "webdataset":
        members = {"._at 10.0.png": b"of macOS", "._at 10.0.json": b"of macOS"}
        for number, (name, caption) in enumerate(pairs):
            members |= {f"{name}.png": encoded(number), f"{name}.json": json.dumps({"caption": caption}).encode()}
        write_tar(folder / "0.TAR", members)
        return {}
    for number, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(encoded(number))
    (folder / "._at 10.0.png").write_bytes(b"of macOS")
    if reader == "sidecars":
        for name, texts in zip(NAMES, column, strict=True):
            (folder / f"{name}.TXT").write_text("\r\n".join(texts or []), newline="")
    if reader == "metadata.jsonl":
        records: list[Any] = [None, 3, "x", {"file_name": 3}]
        for name, texts in zip(NAMES, lists, strict=True):
            records += [{"file_name": f"{name}.png", "text": text} for text in texts]
        write_lines(folder / "metadata.jsonl", records)
        with (folder / "metadata.jsonl").open("a") as file:
            file.write("[" * 100_000)
    if reader == "coco":
        images = [None, {"split": "train"}]
        for name, texts in zip(NAMES, lists, strict=True):
            sentences = [{"raw": text} for text in texts]
            images += [{"filepath": "linked", "split": "train", "filename": f"{name}.png", "sentences": sentences}]
        (above / "own/data/dataset_coco.json").write_text(json.dumps({"images": images}))
        return {"kind": "coco"}
    if reader == "captions.jsonl":
        write_lines(above / reader, [{"id": 7, "file_name": f"{name}.png", "text": text} for name, text in pairs])
        return {"captions": str(above / reader)}
    if reader == "captions.parquet":
        pq.write_table(pa.table({"id": [7] * len(NAMES), "key": NAMES, "text": column}), above / reader)
        return {"captions": str(above / reader)}
    return {}


IMAGE_READERS = ["sidecars", "metadata.jsonl", "coco", "webdataset", "parquet", "hub", "hub stream"]
IMAGE_READERS += ["captions.jsonl", "captions.parquet"]


@pytest.fixture
def linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder store, to which own/data/linked is a link; own/data holds itself, too, and a hidden folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for folder in ("store", "own/data/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own/data/linked").symlink_to(tmp_path / "store")
    (tmp_path / "own/data/loop").symlink_to(tmp_path / "own")
    return tmp_path / "store"


def path_for(reader: str, folder: Path) -> dict[str, Any]:
    if not reader.startswith("hub"):
        return {"path": str(folder.parent / "own/data")}
    (folder.parent / "own/plain").symlink_to(folder)  # `datasets` follows no link below a folder
    return {"kind": "hub", "path": "own/plain", "stream": len(NAMES) if reader == "hub stream" else 0}


@pytest.mark.parametrize("reader", IMAGE_READERS)
def test_images(reader: str, linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = path_for(reader, linked) | write_reader(reader, linked)
    config = ImageSourceConfig(name="mine", val_fraction=0.0, **options)
    samples, reasons = read_all(open_image_source(config, split="train", size=4, seed=0))
    assert {int(sample.image_HWC[0, 0, 0]): sample.captions for sample in samples} == dict(enumerate(READ))
    assert sum(reasons.values()) == 2, "the null and the other type"
    for record in caplog.records:
        assert record.getMessage().isprintable()
    if reader in ("metadata.jsonl", "coco", "captions.jsonl"):
        assert "1 samples" not in caplog.text and "such as" in caplog.text
        config.skip_bad_files = False
        with pytest.raises(UserError, match="set skip_bad_files=true"):
            open_image_source(config, split="train", size=4, seed=0)


TEXTS = ["zero", "a\u2028b\x0cc\x85d", "cup \ud83d"]
BAD_TEXTS = ["", " \n", None, 17, ["x"]]


def write_documents(reader: str, folder: Path) -> None:
    (folder / "._0.txt").write_bytes(b"of macOS \xff")
    if reader == "txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.TXT").write_bytes(text.encode(errors="replace").replace(b"?", b"\xef\xbf\xbd"))
        (folder / "latin.txt").write_bytes(b"caf\xe9")
    elif reader.startswith("jsonl"):
        lines = [json.dumps({"text": text}).encode() for text in (*TEXTS, *BAD_TEXTS)]
        lines += [b'{"text": "caf\xe9"}', b'{"x": "y"}', b"null", b"[" * 100_000, b"{"]
        lines += [b'{"text": "x", "n": ' + b"9" * 5000 + b"}"]
        with pa.output_stream(str(folder / f"0.{reader}"), compression="detect") as file:
            file.write(b"\r\n".join(lines))
    else:
        texts = [text.replace("\ud83d", "\ufffd") for text in TEXTS]
        pq.write_table(pa.table({"text": [*texts, *BAD_TEXTS[:3]]}), folder / "0.parquet")


@pytest.mark.parametrize("reader", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hub", "hub stream"])
def test_documents(reader: str, linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_documents(reader, linked)
    config = TextSourceConfig(name="mine", val_fraction=0.0, **path_for(reader, linked))
    source = open_text_source(config, split="train")
    texts = sorted(readable_texts(source, seed=0, name="x"))
    assert texts == sorted(text.replace("\ud83d", "\ufffd") for text in TEXTS)
    if reader.startswith("jsonl"):
        assert "mine': 3 samples; blank: 2" in caplog.text and "no text in field 'text': 9" in caplog.text
    if reader in ("parquet", "hub"):
        assert "null: 1" in caplog.text and len(source) == 5
    if reader == "txt":
        assert "latin.txt" in caplog.text and "not UTF-8" in caplog.text
    if not reader.startswith("hub"):
        config.skip_bad_files = False
        with pytest.raises(UserError, match="set skip_bad_files=true"):
            open_text_source(config, split="train")


def opened(path: Path, **options: Any) -> tuple[dict[str, tuple[str, ...]], Any]:
    """The captions of the train split by key, and the source."""
    source = test_sources.opened(path, **{"val_fraction": 0.0, **options})
    return {sample.key: sample.captions for sample in read_all(source)[0]}, source


def counts(source: Any) -> dict[str, int]:
    return {reason: number for reason, (number, _) in source.bad_files.counts.items()}


def test_joined_and_linked_members_of_a_tar(tmp_path: Path) -> None:
    """As `tar` extracts them: joined archives, the last member of a name, hard links; a symbolic link is counted."""
    write_tar(tmp_path / "a.tar", {"a.png": encoded(1), "a.txt": b"old", "b.png": encoded(2), "b.txt": b"b"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("c.png", tarfile.LNKTYPE), ("c.txt", tarfile.LNKTYPE), ("d.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, f"b.{name[2:]}"
            tar.addfile(member)
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    write_tar(tmp_path / "b.tar", {"e.png": encoded(3), "e.txt": b"e"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    captions, source = opened(tmp_path / "a.tar")
    assert captions == {"a.tar#a": ("new",), "a.tar#b": ("b",), "a.tar#c": ("b",), "a.tar#e": ("e",)}
    assert counts(source) == {"link, sparse or special member": 1, "replaced by a later member of the same name": 1}


def test_names_of_webdataset(tmp_path: Path) -> None:
    """A dotted name is its own sample, unless its captions are those of the stem up to the first dot."""
    images = "1.5.png 1.6.png z.left.png z.right.png z.txt y.png y.a.txt 10.20.png 10.20.txt 10.21.jpg 10.21.png"
    names = [*images.split(), "10.21.txt", "lost.txt"]
    write_tar(tmp_path / "a.tar", {name: name.encode() if name.endswith("txt") else encoded(1) for name in names})
    captions, source = opened(tmp_path / "a.tar")
    texts = {"z": "z.txt", "y": "y.a.txt", "10.20": "10.20.txt", "10.21": "10.21.txt"}
    assert captions == {f"a.tar#{stem}": (text,) for stem, text in texts.items()}
    reasons = ("second image of one sample", "second image of one name", "captions without an image")
    assert counts(source) == dict.fromkeys(reasons, 1)
    assert len(opened(tmp_path / "a.tar", has_captions=False)[0]) == 6


def write_named(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(1))


@pytest.mark.parametrize(
    ("images", "names", "expected"),
    [
        (["a/1.png", "b/1.png"], ["images/a/1.png", "images/b/1.png"], {"a/1.png": 0, "b/1.png": 1}),
        (["1.png", "b/1.png"], ["b/1", "1"], {"1.png": 1, "b/1.png": 0}),
        (["1.png", "1.jpg"], ["x\\1.jpg", "x\\1.png"], {"1.png": 1, "1.jpg": 0}),
        (["caf\u00e9.png", "x.png"], ["./cafe\u0301.png", "lost.png"], {"caf\u00e9.png": 0}),
        (["sa_007.png", "x.png"], [7, 8], {"sa_007.png": 0}),
        (["1.png", "2.png"], ["1.png", "1.png"], {"1.png": 0}),
        (["a/1.png", "b/1.png"], ["1.png"], "a/1.png and b/1.png"),
        (["1.png"], ["a/1.png", "b/1.png"], "1"),
        (["sa_1.png", "sb_1.png"], [1], "sa_1.png and sb_1.png"),
        (["1.png"], ["2.png"], "none of its 1 images"),
    ],
)
def test_names_in_captions(tmp_path: Path, images: list[str], names: list[Any], expected: Any) -> None:
    write_named(tmp_path / "data", *images)
    write_lines(tmp_path / "c.jsonl", [{"id": name, "text": f"text {number}"} for number, name in enumerate(names)])
    options = {"kind": "folder", "captions": str(tmp_path / "c.jsonl")}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            opened(tmp_path / "data", **options)
    else:
        captions, source = opened(tmp_path / "data", **options)
        assert {key: texts[0] for key, texts in captions.items()} == {key: f"text {n}" for key, n in expected.items()}
        num_lost = len(set(names)) - len(expected)
        assert counts(source).get("names no image", 0) == num_lost


def test_names_in_metadata_and_beside_images(tmp_path: Path) -> None:
    write_named(tmp_path, "a/\u00e9.png", "a/e\u0301.png", "a/i\u0301.png", "b.png", "c.png")
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "README.txt").write_text("no caption")
    records = [{"file_name": f"{name}.png", "text": name} for name in ("a\\\u00e9", "a/e\u0301", "a/\u00ed", "lost")]
    write_lines(tmp_path / "metadata.jsonl", records)
    captions, source = opened(tmp_path)
    expected = {"a/\u00e9.png": "a\\\u00e9", "a/e\u0301.png": "a/e\u0301", "a/i\u0301.png": "a/\u00ed", "c.png": "c"}
    assert captions == {key: (text,) for key, text in expected.items()}
    assert counts(source) == {"names no image": 1, "no caption": 1}


@pytest.mark.parametrize("name", ["c.jpg", "c.TXT"])
def test_captions_of_two_images_or_images_with_two_captions_are_refused(tmp_path: Path, name: str) -> None:
    write_named(tmp_path, "b.png", "c.png")
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / name).write_bytes((tmp_path / "c.png").read_bytes() if name == "c.jpg" else b"other")
    with pytest.raises(UserError, match=rf"c\.\w+ and .*{name}|{name} and .*c\.\w+"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["a [1]", "b*", "c?d", "[!x]"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str, parquet_in_memory: bool) -> None:
    folder = tmp_path / name
    folder.mkdir()
    pq.write_table(pa.table({"image": [encoded(1)], "caption": ["one"]}), folder / "x[0].parquet")
    assert opened(folder)[0] == opened(folder / "x[0].parquet")[0] == {"x[0].parquet#0": ("one",)}


def test_types_of_all_parquet_files_together(tmp_path: Path, parquet_in_memory: bool) -> None:
    columns = [pa.nulls(1), pa.array(["one"]).dictionary_encode(), pa.array(["two"])]
    columns += [pa.array(["six"], pa.large_string())]
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"image": [encoded(1)], "caption": column}), tmp_path / f"{number}.parquet")
    assert sorted(opened(tmp_path)[0].values()) == [("one",), ("six",), ("two",)]
    pq.write_table(pa.table({"image": [encoded(1)], "words": ["x"]}), tmp_path / "9.parquet")
    with pytest.raises(UserError, match=r"source 'mine'.*9\.parquet' has no column 'caption'"):
        opened(tmp_path)


def test_row_groups_over_2_gib(tmp_path: Path, parquet_in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow reads them in batches only."""

    def read(parquet: pq.ParquetFile, *args: Any) -> None:
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    pq.write_table(pa.table({"image": [{"bytes": encoded(1)}], "caption": ["one"]}), tmp_path / "0.parquet")
    monkeypatch.setattr(pq.ParquetFile, "read", read)
    assert opened(tmp_path / "0.parquet")[0] == {"0.parquet#0": ("one",)}


def test_rows_of_other_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = ["train", "restval", "val", "test", None, "extra", "extra"]
    table = {"image": [encoded(1)] * 7, "caption": [str(split) for split in splits], "split": splits}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert list(opened(tmp_path)[0].values()) == [("train",), ("restval",)]
    assert "'None' (1), 'extra' (2)" in caplog.text and "test" not in caplog.messages[0].partition("not read")[2]


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [*pa.array(["good", "bad!"]).buffers()[:2], pa.py_buffer(b"good\xff\xff\xff\xff")]
    )
    pq.write_table(pa.table({"image": [encoded(1)] * 2, "caption": text}), tmp_path / "a.parquet")
    assert opened(tmp_path)[0] == {"a.parquet#0": ("good",)}


def test_the_fingerprint_depends_on_what_is_read(tmp_path: Path) -> None:
    write_named(tmp_path / "a", "1.png", "2.png")
    (tmp_path / "a/1.txt").write_text("one")
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    places = (("a", 1.0), ("a", 3.0), ("moved", 1.0))
    configs = [ImageSourceConfig("mine", path=str(tmp_path / folder), weight=weight) for folder, weight in places]
    before = source_fingerprint(configs[0])
    for name in (".DS_Store", "README.txt", "1.txt~", "._1.png"):
        (tmp_path / "a" / name).write_bytes(b"x")
    os.utime(tmp_path / "a/1.png", (1, 1))
    assert [source_fingerprint(config) for config in configs] == [before] * 3
    other = ImageSourceConfig(name="mine", path=str(tmp_path / "a"), has_captions=False)
    assert source_fingerprint(other) != before
    for change in (
        lambda: (tmp_path / "a/1.txt").write_text("two"),
        lambda: (tmp_path / "a/1.png").rename(tmp_path / "a/3.png"),
        lambda: (tmp_path / "a/2.txt").write_text("two"),
        lambda: write_named(tmp_path / "a", "4.png"),
    ):
        change()
        assert source_fingerprint(configs[0]) != before
        before = source_fingerprint(configs[0])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.parquet")
    texts = TextSourceConfig(name="mine", path=str(tmp_path / "t.parquet"))
    assert source_fingerprint(texts) == source_fingerprint(texts) != before


def test_captions_of_one_and_of_several_texts_go_together(tmp_path: Path) -> None:
    write_named(tmp_path / "data", "1.png", "2.png", "3.png", "2021-03-04.png")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_lines(folder / "1.jsonl", [{"id": "1", "text": "one"}])
    write_lines(folder / "2.jsonl", [{"id": "2", "text": "two"}])
    with (folder / "2.jsonl").open("a") as file:
        file.write("not json\n")
    write_lines(folder / "3.jsonl", [{"id": "2021-03-04", "text": "2021-03-05"}])  # no dates
    with (folder / "4.parquet").open("wb") as file:
        pq.write_table(pa.table({"id": ["3"], "text": [["three", "drei"]]}), file)
    captions, source = opened(tmp_path / "data", kind="folder", captions=str(folder))
    assert captions == {
        "1.png": ("one",), "2.png": ("two",), "3.png": ("three", "drei"), "2021-03-04.png": ("2021-03-05",),
    }  # fmt: skip
    assert counts(source) == {"no name or no caption": 1}


def test_a_split_whose_files_cannot_be_read_is_not_replaced(tmp_path: Path) -> None:
    for name in ("train", "validation-0", "validation-1"):
        table = {"image": [encoded(number) for number in range(20)], "caption": ["a"] * 20}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    (tmp_path / "validation-0.parquet").write_bytes(b"PAR1")
    assert len(opened(tmp_path, val_fraction=0.25)[0]) == 20
    (tmp_path / "validation-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="no file of its split 'validation' can be read"):
        opened(tmp_path, val_fraction=0.25)
