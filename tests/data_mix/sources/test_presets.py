"""The paper's data sets, each on a few files in its own format."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.presets import IMAGE_PRESETS, TEXT_PRESETS
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from tests.data_mix.sources.test_sources import write_tar
from um3.core.errors import UserError


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number * 10, 0, 255)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_img2dataset(folder: Path, **columns: Any) -> None:
    """Two shards as img2dataset writes them, with their statistics and the table of what was tried."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        keys = [f"{shard:05d}{row:04d}" for row in range(3)]
        for row, key in enumerate(keys):
            number = 3 * shard + row
            record = {"url": f"https://x/{key}.jpg", "caption": f"alt text {number}", "key": key, "status": "success"}
            members[f"{key}.jpg"] = jpeg(number)
            members[f"{key}.txt"] = f"alt text {number}".encode()
            members[f"{key}.json"] = json.dumps(record | {"width": 20} | columns).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"key": keys, "status": ["success"] * 3}), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")


def images(preset: str, path: Path, split: Split = "train", **options: Any) -> ImageSource:
    options = {"val_fraction": 0.0} | options
    config = ImageSourceConfig(name="mine", preset=preset, path=str(path), **options)
    return open_image_source(config, split=split, size=8, seed=0)


def samples(source: ImageSource) -> list[Sample]:
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("preset", ["cc12m", "laion-coco-aesthetic", "datacomp-1b"])
def test_shards_of_img2dataset(preset: str, tmp_path: Path) -> None:
    write_img2dataset(tmp_path, uid="f" * 32, recaption="a long caption", aesthetic_score=6.1)
    read = samples(images(preset, tmp_path))
    assert [sample.captions for sample in read] == [(f"alt text {number}",) for number in range(6)]
    assert read[3].key == "00001.tar#000010000"
    other = samples(images(preset, tmp_path, caption_column="recaption"))
    assert {sample.captions for sample in other} == {("a long caption",)}


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "parquet", "parquet by number"])
def test_sa1b_takes_its_captions_from_a_file_of_ones_own(form: str, tmp_path: Path) -> None:
    numbers = [223750, 223751, 9, 223752]
    members: dict[str, bytes] = {}
    for place, number in enumerate(numbers):
        masks = {"image": {"image_id": number, "file_name": f"sa_{number}.jpg"}, "annotations": [{"area": 3}]}
        members |= {f"./sa_{number}.jpg": jpeg(place), f"./sa_{number}.json": json.dumps(masks).encode()}
    write_tar(tmp_path / "sa_000020.tar", members)
    rows = [{"image_id": f"sa_{n}.jpg", "caption": f"number {n}", "model": "m"} for n in reversed(numbers[:3])]
    file = tmp_path / f"captions.{form.split()[0]}"
    if form.startswith("parquet"):
        keys: list[Any] = numbers[:3] if "number" in form else [f"images/sa_{n}.jpg" for n in numbers[:3]]
        texts = [[f"number {n}", "short"] for n in numbers[:3]]
        pq.write_table(pa.table({"image_id": keys, "captions": texts}), file)
    else:
        with pa.output_stream(str(file), compression="detect") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    source = images("sa1b", tmp_path / "*.tar", captions=str(file))
    more = ("short",) if form.startswith("parquet") else ()
    assert [source[i].captions for i in range(3)] == [(f"number {number}", *more) for number in numbers[:3]]
    with pytest.raises(BadSample, match=r"empty caption: sa_000020.tar#./sa_223752"):
        source[3]
    with pytest.raises(UserError, match=r"preset=sa1b needs captions; it reads Meta's sa_NNNNNN\.tar"):
        images("sa1b", tmp_path / "*.tar")


def test_captions_of_ones_own_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images/deep").mkdir(parents=True)
    (tmp_path / "images/deep/one.jpg").write_bytes(jpeg(1))
    (tmp_path / "images/deep/one.txt").write_text("not this")
    (tmp_path / "c.jsonl").write_text('{"key": "one", "text": "mine"}\n{"key": null, "text": "x"}\n')
    assert samples(images("", tmp_path / "images", captions=str(tmp_path / "c.jsonl")))[0].captions == ("mine",)
    (tmp_path / "bad.jsonl").write_text('{"name": "one", "text": "mine"}\n')
    with pytest.raises(UserError, match=r"need a column of key, image_id, .*; there are name, text"):
        images("", tmp_path / "images", captions=str(tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match=r"captions '.*broken.parquet' cannot be read"):
        (tmp_path / "broken.parquet").write_bytes(b"nothing")
        images("", tmp_path / "images", captions=str(tmp_path / "broken.parquet"))
    with pytest.raises(UserError, match=r"captions are for folders and \.tar files, not for kind=scenes"):
        config = ImageSourceConfig(captions=str(tmp_path / "c.jsonl"))
        open_image_source(config, split="train", size=32, seed=0)


def test_coco_in_karpathys_split(tmp_path: Path) -> None:
    entries = []
    for number, (folder, split) in enumerate(
        [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")]
    ):
        name = f"COCO_{folder}_{number:012d}.jpg"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(jpeg(number))
        raw = [f"A photo, number {number}.", f"Again {number}"]
        sentences = [{"raw": text, "tokens": text.lower().split(), "imgid": number, "sentid": 5} for text in raw]
        entries.append({"filepath": folder, "filename": name, "split": split, "cocoid": number, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    train = samples(images("coco", tmp_path))
    assert [sample.key for sample in train] == [
        "train2014/COCO_train2014_000000000000.jpg",
        "val2014/COCO_val2014_000000000001.jpg",
    ]
    assert train[1].captions == ("A photo, number 1.", "Again 1")
    assert [sample.captions[1] for sample in samples(images("coco", tmp_path, "val"))] == ["Again 2"]
    (tmp_path / "val2014/COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(BadSample):
        images("coco", tmp_path, "val")[0]
    (tmp_path / "dataset_coco.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="is not in Karpathy's format"):
        images("coco", tmp_path)
    with pytest.raises(UserError, match=r"no dataset_coco.json in .*; put Karpathy's file beside train2014/"):
        images("coco", tmp_path / "train2014")


def dclm_records(numbers: range) -> list[dict[str, Any]]:
    return [
        {
            "text": f"Document {number} of the web.\n\nIts second line.",
            "url": f"https://x/{number}",
            "metadata": {"WARC-Type": "response", "Content-Length": "3"},
            "language_id_whole_page_fasttext": {"en": 0.98},
            "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.3,
            "previous_word_count": 7,
        }
        for number in numbers
    ]


def texts_of(source: TextSource) -> list[str]:
    return [source[index] for index in range(len(source))]


def test_dclm_as_distributed_and_as_parquet(tmp_path: Path) -> None:
    records = dclm_records(range(9))
    folder = tmp_path / "global-shard_01_of_10/local-shard_0_of_10"
    folder.mkdir(parents=True)
    for shard in range(3):
        with pa.output_stream(str(folder / f"shard_0000000{shard}_processed.jsonl.zst"), compression="zstd") as stream:
            stream.write("".join(json.dumps(record) + "\n" for record in records[3 * shard : 3 * shard + 3]).encode())
    expected = [record["text"] for record in records]
    config = TextSourceConfig(name="dclm", preset="dclm-baseline", path=str(tmp_path), val_fraction=0.0)
    source = open_text_source(config, split="train")
    assert texts_of(source) == expected
    assert [source[index] for index in (8, 0, 4)] == [expected[8], expected[0], expected[4]]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "part.parquet")
    table = TextSourceConfig(name="dclm", preset="dclm-baseline", path=str(tmp_path / "part.parquet"), val_fraction=0.0)
    assert texts_of(open_text_source(table, split="train")) == expected


def test_adapters_are_spelt_right_and_pointed_at_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no adapter 'cc3m'; there are cc12m, coco, datacomp-1b, laion"):
        images("cc3m", tmp_path)
    with pytest.raises(UserError, match=r"preset=dclm-baseline needs path; it reads the \.jsonl\.zst files"):
        open_text_source(TextSourceConfig(preset="dclm-baseline"), split="train")
    with pytest.raises(UserError, match="there is no adapter 'cc12m'; there are dclm-baseline"):
        open_text_source(TextSourceConfig(preset="cc12m", path="x"), split="train")
    pq.write_table(pa.table({"url": ["https://x/1.jpg"], "caption": ["alt"]}), tmp_path / "links.parquet")
    with pytest.raises(UserError, match="image column among url, caption; download its links with img2dataset"):
        images("laion-coco-aesthetic", tmp_path / "links.parquet")
    assert set(IMAGE_PRESETS) | set(TEXT_PRESETS) == {
        "dclm-baseline", "cc12m", "sa1b", "laion-coco-aesthetic", "datacomp-1b", "coco",
    }  # fmt: skip
