"""The paper's data sets, each on a few files in its own format."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_mix.samples import BadSample, ImageSource, Split
from data_mix.sources.text import TextSourceConfig, open_text_source
from tests.data_mix.sources.test_sources import opened
from tests.helpers.image_files import encoded, write_tar
from um3.core.errors import UserError


def write_rows(file: Path, table: pa.Table) -> None:
    """A parquet file, or JSON lines that are compressed if the name says so."""
    if file.suffix == ".parquet":
        return pq.write_table(table, file)
    with pa.output_stream(str(file), compression="detect") as stream:
        return stream.write("".join(json.dumps(record) + "\n" for record in table.to_pylist()).encode())


def write_img2dataset(folder: Path, **columns: Any) -> None:
    """Two shards as img2dataset writes them, with their statistics and the table of its attempts."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        keys = [f"{shard:05d}{row:04d}" for row in range(3)]
        for number, key in enumerate(keys, start=3 * shard):
            record = {"url": f"https://x/{key}.jpg", "caption": f"alt text {number}", "key": key, "status": "success"}
            members[f"{key}.jpg"] = encoded(number, "JPEG")
            members[f"{key}.txt"] = f"alt text {number}".encode()
            members[f"{key}.json"] = json.dumps(record | {"width": 20} | columns).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"key": keys, "status": ["success"] * 3}), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")


def images(preset: str, path: Path, split: Split = "train", **options: Any) -> ImageSource:
    return opened(path, split, preset=preset, val_fraction=0.0, **options)


@pytest.mark.parametrize("preset", ["cc12m", "laion-coco-aesthetic", "datacomp-1b"])
def test_shards_of_img2dataset(preset: str, tmp_path: Path) -> None:
    write_img2dataset(tmp_path, uid="f" * 32, recaption="a long caption", aesthetic_score=6.1)
    alt_texts = list(images(preset, tmp_path))
    assert [sample.captions for sample in alt_texts] == [(f"alt text {number}",) for number in range(6)]
    assert alt_texts[3].key == "00001.tar#000010000"
    recaptions = images(preset, tmp_path, caption_column="recaption")
    assert {sample.captions for sample in recaptions} == {("a long caption",)}


@pytest.mark.parametrize("form", ["jsonl.zst", "parquet", "parquet by number"])
def test_sa1b_takes_its_captions_from_another_file(form: str, tmp_path: Path) -> None:
    numbers = [223750, 223751, 9, 223752]
    members: dict[str, bytes] = {}
    for number in numbers:
        masks = {"image": {"image_id": number, "file_name": f"sa_{number}.jpg"}, "annotations": [{"area": 3}]}
        members |= {f"./sa_{number}.jpg": encoded(1, "JPEG"), f"./sa_{number}.json": json.dumps(masks).encode()}
    write_tar(tmp_path / "sa_000020.tar", members)
    keys: list[Any] = numbers[:3] if "number" in form else [f"images/sa_{n}.jpg" for n in numbers[:3]]
    texts = [[f"number {n}", "short"] for n in numbers[:3]]
    file, rows = tmp_path / f"captions.{form.split()[0]}", pa.table({"image_id": keys, "captions": texts})
    write_rows(file, rows.take([2, 1, 0]))
    source = images("sa1b", tmp_path / "*.tar", captions=str(file))
    assert [source[i].captions for i in range(3)] == [(f"number {number}", "short") for number in numbers[:3]]
    with pytest.raises(BadSample, match=r"empty caption: sa_000020.tar#./sa_223752"):
        source[3]
    with pytest.raises(UserError, match=r"preset=sa1b needs captions"):
        images("sa1b", tmp_path / "*.tar")


def test_mistakes_in_captions(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(encoded(1, "JPEG"))
    (tmp_path / "bad.jsonl").write_text('{"name": "one", "text": "mine"}')
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    for file, message in (
        ("bad.jsonl", r"need a column of file_name, .*name, text"),
        ("broken.parquet", r"captions '.*broken.parquet' cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            images("", tmp_path, kind="folder", captions=str(tmp_path / file))
    with pytest.raises(UserError, match="not for kind=scenes"):
        opened("", kind="scenes", captions=str(tmp_path / "c.jsonl"))


def test_coco_in_karpathys_split(tmp_path: Path) -> None:
    entries = []
    folders = [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")]
    for number, (folder, split) in enumerate(folders):
        name = f"COCO_{folder}_{number:012d}.jpg"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(encoded(number, "JPEG"))
        raw = [f"A photo, number {number}.", f"Again {number}"]
        sentences = [{"raw": text, "tokens": text.lower().split(), "imgid": number, "sentid": 5} for text in raw]
        entries.append({"filepath": folder, "filename": name, "split": split, "cocoid": number, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    train = list(images("coco", tmp_path))
    keys = ["train2014/COCO_train2014_000000000000.jpg", "val2014/COCO_val2014_000000000001.jpg"]
    assert [sample.key for sample in train] == keys
    assert train[1].captions == ("A photo, number 1.", "Again 1")
    assert [sample.captions[1] for sample in images("coco", tmp_path, "val")] == ["Again 2"]
    (tmp_path / "val2014/COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(BadSample):
        images("coco", tmp_path, "val")[0]
    (tmp_path / "dataset_coco.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match=r"Karpathy's dataset_coco\.json has no 'images'"):
        images("coco", tmp_path)
    with pytest.raises(UserError, match=r"no dataset_coco\.json"):
        images("coco", tmp_path / "train2014")


def test_dclm_as_distributed_and_as_parquet(tmp_path: Path) -> None:
    texts = [f"Document {number} of the web.\n\nIts second line." for number in range(9)]
    records = [{"text": text, "url": "https://x", "metadata": {"WARC-Type": "response"}} for text in texts]
    folder = tmp_path / "global-shard_01_of_10/local-shard_0_of_10"
    folder.mkdir(parents=True)
    for shard in range(3):
        table = pa.Table.from_pylist(records[3 * shard : 3 * shard + 3])
        write_rows(folder / f"shard_0000000{shard}_processed.jsonl.zst", table)
    write_rows(tmp_path / "part.parquet", pa.Table.from_pylist(records))
    for path in (folder, tmp_path / "part.parquet"):
        config = TextSourceConfig(name="dclm", preset="dclm-baseline", path=str(path), val_fraction=0.0)
        source = open_text_source(config, split="train")
        assert [source[index] for index in (*range(9), 8, 0, 4)] == [*texts, texts[8], texts[0], texts[4]]


def test_mistakes_name_the_presets_and_their_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no preset 'cc3m'.* cc12m, coco, datacomp-1b, laion"):
        images("cc3m", tmp_path)
    with pytest.raises(UserError, match=r"preset=dclm-baseline needs path; it reads the \.jsonl\.zst files"):
        open_text_source(TextSourceConfig(preset="dclm-baseline"), split="train")
    with pytest.raises(UserError, match=r"no preset 'cc12m'.* dclm-baseline"):
        open_text_source(TextSourceConfig(preset="cc12m", path="x"), split="train")
    pq.write_table(pa.table({"url": ["https://x/1.jpg"], "caption": ["alt"]}), tmp_path / "links.parquet")
    with pytest.raises(UserError, match="image column among url, caption; download its links with img2dataset"):
        images("laion-coco-aesthetic", tmp_path / "links.parquet")
