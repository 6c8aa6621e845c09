"""The reading rules of evaluation's files: hidden files, links, line ends, encodings, odd records, ids of results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.command import SkipCounter
from eval.results_cache import supplied_results
from eval.tables import image_files, json_lines, read_records
from eval.tasks.classification_data import data_hash, read_class_names
from eval.tasks.prompts import read_prompts
from um3.core.errors import UserError

IDS = {"COCO_val2014_000000000100.jpg": "100", "COCO_val2014_000000000101.jpg": "101"}


def test_only_line_feeds_and_carriage_returns_end_a_prompt_or_a_class_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028half\ntwo\x85half\r\nthree\x0chalf".encode())
    assert len(read_prompts(tmp_path / "a.txt")) == 3
    assert read_class_names(str(tmp_path / "a.txt"), classes=["0", "1", "2"])[0] == "one\u2028half"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "folder/a.txt", "folder/a.jsonl"])
def test_another_encoding_is_named_with_its_file(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("prompt\nfirst\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=f"{path}:[13]"):
        read_prompts(path.parent if name == "folder/a.txt" else path)


def test_hidden_files_are_passed_over_and_links_followed(tmp_path):
    folder = tmp_path / "images [1]"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "a.png", folder / ".ipynb_checkpoints/a.png", tmp_path / "elsewhere/b.PNG"):
        Image.new("RGB", (4, 4)).save(path, format="PNG")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("._a.png", "._a.txt", ".DS_Store"):
        (folder / name).write_bytes(b"\xff\xfe")
    (folder / "a.txt").write_text("a caption")
    assert list(image_files(folder)) == ["a.png", "linked/b.PNG"]
    assert [record.fields["captions"] for record in read_records(folder) if record.fields["text"]] == [["a caption"]]
    before = data_hash(folder)
    (folder / ".DS_Store").write_bytes(b"other")
    (folder / "a.png").touch()
    assert data_hash(folder) == before
    (folder / "a.txt").write_text("A caption")
    assert data_hash(folder) != before


def test_odd_records_are_counted_alike(tmp_path):
    odd = ["null", "3", "[]", "{half", '{"a": ' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '"text"', "\0"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": "half \ud83d"}), *odd, json.dumps({"text": "whole"})]))
    texts = [record.fields and record.fields["text"] for record in json_lines(path)]
    assert texts == ["half \ufffd", *[None] * len(odd), "whole"]


@pytest.mark.parametrize(
    ("rows", "captions", "num_skipped"),
    [
        ([{"image_id": 100, "caption": "x"}, {"image_id": 101, "caption": None}], ["x", ""], 0),
        ([{"image_id": "000000000101", "caption": "y"}, {"image_id": 100.0, "caption": "x"}], ["x", "y"], 0),
        ([{"image_id": "COCO_val2014_000000000100", "caption": "x"}], ["x"], 1),
        ([{"file": "COCO_val2014_000000000100.jpg", "caption": "x"}, {"image_id": 999, "caption": "z"}], ["x"], 1),
    ],
)
def test_results_are_matched_by_every_form_of_an_id(rows, captions, num_skipped, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    skipped = SkipCounter()
    results = supplied_results(tmp_path / "a.json", field="caption", ids=IDS, skipped=skipped)
    assert [results[name] for name in IDS if name in results] == captions and skipped.count == num_skipped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image_id": 100, "caption": "x"}, {"image_id": "0100", "caption": "y"}], "second caption for '0100'"),
        ([{"image_id": "a", "caption": "x"}], "'a'.*COCO_val2014_000000000100.jpg or 100"),
    ],
)
def test_results_that_are_ambiguous_or_of_another_set_are_refused(rows, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        supplied_results(Path(tmp_path / "a.json"), field="caption", ids=IDS, skipped=SkipCounter())
