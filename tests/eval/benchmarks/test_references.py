import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.benchmarks.references import read_references
from eval.command import SkipCounter
from um3.core.errors import UserError
from um3.inference.image_io import png_bytes, save_png

IMAGE = np.zeros((4, 4, 3), np.uint8)


def karpathy(path, *, folder="val2014"):
    images = [
        {"filepath": folder, "filename": f"{split}{i}.png", "cocoid": 10 * i, "split": split, "sentences": sentences}
        for split in ("train", "val", "test")
        for i, sentences in enumerate([[{"raw": "a\u2028dog "}, {"raw": "a pet"}], [{"raw": "a cat"}], []])
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def read(path, **options):
    skipped = SkipCounter()
    return read_references(str(path), skipped=skipped, **options), skipped


def test_karpathys_file(tmp_path):
    save_png(IMAGE, tmp_path / "val2014" / "test0.png")
    images, skipped = read(karpathy(tmp_path / "dataset_coco.json"))
    assert [(image.name, image.references, image.image_id) for image in images] == [
        ("val2014/test0.png", ["a dog", "a pet"], "0"),
        ("val2014/test1.png", ["a cat"], "10"),
    ]
    assert images[0].image == tmp_path / "val2014" / "test0.png"
    assert skipped.to_dict() == {"image without captions": {"count": 1, "first": ["val2014/test2.png"]}}
    flat, _ = read(karpathy(tmp_path / "dataset_coco.json", folder="elsewhere"), split="val", limit=1)
    assert [image.image for image in flat] == [tmp_path / "val0.png"]


def test_cocos_own_annotations(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 7, "caption": "a dog"},
            *[None, 3, {"image_id": 7}, {"image_id": [7], "caption": "x"}, {"image_id": 9, "caption": "no image"}],
            *[{"image_id": 8, "caption": None}, {"image_id": 7, "caption": "a pet"}],
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    images, skipped = read(tmp_path / "captions.json", images=str(tmp_path / "images"))
    assert [(image.image, image.references, image.image_id) for image in images] == [
        (tmp_path / "images" / "a.png", ["a dog", "a pet"], "7")
    ]
    counts = {reason: entry["count"] for reason, entry in skipped.to_dict().items()}
    without_name, without_caption = sorted((reason for reason in counts if "none of" in reason), key=len)
    assert counts == {"not a JSON object": 2, without_name: 2, without_caption: 1, "image without captions": 1}
    content["images"][1]["id"] = 7
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="two images with one id"):
        read(tmp_path / "captions.json")


ENTRIES = [("a.05.png", "a dog"), ("b.png", "a cat"), ("a.05.png", "a pet"), ("a.png", "x"), ("", "odd")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_form_keeps_all_captions_and_counts_odd_entries(suffix, tmp_path):
    entries, path = [{"file_name": name or None, "caption": caption} for name, caption in ENTRIES], tmp_path / "a"
    path = path.with_suffix(suffix)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(entries), path)
    elif suffix == ".json":
        path.write_text(json.dumps(entries))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    else:
        mark = "," if suffix == ".csv" else "\t"
        path.write_text("\n".join(mark.join(fields) for fields in [("file_name", "caption"), *ENTRIES]))
    images, skipped = read(path)
    expected = [("a.05.png", ["a dog", "a pet"]), ("b.png", ["a cat"]), ("a.png", ["x"])]
    assert [(image.name, image.references) for image in images] == expected and skipped.count == 1
    assert [image.references for image in read(path, limit=1)[0]] == [["a dog", "a pet"]]


def test_tables_of_names_and_lines(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"a.png": "a dog", "b.png": ["a cat", "a pet"]}))
    assert [image.references for image in read(tmp_path / "t.json")[0]] == [["a dog"], ["a cat", "a pet"]]
    first, second = '{"file_name": "a.png", "caption": "a dog"}', '{"file_name": "b.png", "captions": ["c"]}'
    (tmp_path / "metadata.jsonl").write_text("\n".join([first, "{", '{"caption": "x"}', second]))
    for path in (tmp_path / "metadata.jsonl", tmp_path):
        images, skipped = read(path)
        assert {image.name: image.image for image in images} == {f"{n}.png": tmp_path / f"{n}.png" for n in "ab"}
        assert [entry["first"] for entry in skipped.to_dict().values()] == [["metadata.jsonl:2"], ["metadata.jsonl:3"]]


def test_a_folder_with_texts_beside_its_images(tmp_path):
    for name in ("a", "b"):
        save_png(IMAGE, tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a dog\na pet\n")
    images, skipped = read(tmp_path)
    assert [(image.name, image.references) for image in images] == [("a.png", ["a dog", "a pet"])]
    assert skipped.to_dict()["image without captions"]["first"] == ["b.png"]
    save_png(IMAGE, tmp_path / "a.jpg")
    with pytest.raises(UserError, match=f"'{tmp_path}/a'"):
        read(tmp_path)


def test_parquet_of_the_hubs_forms(tmp_path):
    data = png_bytes(IMAGE)
    names = {"filepath": ["val2014"] * 3, "filename": ["a.jpg", "b.jpg", "c.jpg"], "split": ["test", "val", "test"]}
    by_name = {**names, "sentences": [["a dog", "a pet"], ["x"], ["a cat"]], "cocoid": [1, 2, 3]}
    pq.write_table(pa.table(by_name), tmp_path / "by_name.parquet")
    images, _ = read(tmp_path / "by_name.parquet", images=str(tmp_path / "coco"))
    folder = tmp_path / "coco"
    assert [(image.image, image.image_id) for image in images] == [(folder / "a.jpg", "1"), (folder / "c.jpg", "3")]
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        images = [{"bytes": data, "path": None}] * 2
        columns = {"image": images, "answer": [[f"a {split} dog"], ["a cat"]]}
        pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    images, _ = read(folder)
    expected = [("000000", data, ["a test dog"]), ("000001", data, ["a cat"])]
    assert [(image.name, image.image, image.references) for image in images] == expected


def test_an_inaccessible_hub_set_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither .* nor an accessible hub set with a split test"):
        read("nobody/nothing")
