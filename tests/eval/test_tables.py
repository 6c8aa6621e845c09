"""The reading rules of evaluation's files: hidden files, links, line ends, encodings, odd records, ids of results."""

import json

import pytest
from PIL import Image

from eval.benchmarks.references import read_references
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


def results(path):
    return supplied_results(path, field="caption", ids=IDS, skipped=SkipCounter())


def references(path):
    return read_references(str(path), skipped=SkipCounter())


SAME_ID = '{"image_id": 100, "caption": "x"}\n{"image_id": "0100", "caption": "y"}'
SAME_PROMPT_ID = '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n'
LATIN_1 = "prompt\nfirst\ncaf\xe9\n"
OTHER_SPLIT = '{"images": [{"split": "val", "filename": "a", "sentences": []}]}'


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (read_prompts, "none.txt", None, "does not exist"),
        (read_prompts, "a.txt", "", "contains no prompts"),
        (read_prompts, "a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2: expected an object with a text"),
        (read_prompts, "a.jsonl", '{"tag": "colors"}\n', "a.jsonl:1: expected an object with a text"),
        (read_prompts, "a.jsonl", '{"prompt": " "}\n', "prompt 1 .00000. is empty"),
        (read_prompts, "a.jsonl", '{"id": "../x", "prompt": "a"}\n', "id '../x' of prompt 1 must .* valid file name"),
        (read_prompts, "a.jsonl", SAME_PROMPT_ID, "id 'x' of prompt 2 must be unique"),
        (read_prompts, "a.csv", "words\na\n", "a.csv, record 1: expected an object with a text"),
        (read_prompts, "a.json", "7", "cannot be read as prompts"),
        *((read_prompts, name, LATIN_1, f"{name}:[13]") for name in ("a.txt", "a.csv", "a.jsonl", "b/a.txt")),
        (references, "a.json", "{", "a.json is not valid JSON"),
        (references, "a.json", '{"images": [{"split": "test"}]}', "none of sentences_raw"),
        (references, "a.json", OTHER_SPLIT, "check that it has a split test"),
        (references, "a.jsonl", '{"file_name": "a", "caption": " "}', "no image with captions; 1 skipped: image with"),
        (results, "none.jsonl", None, "does not exist"),
        (results, "a.json", "{", "not valid JSON"),
        (results, "a.jsonl", '{"image_id": 100}', "contains no"),
        (results, "a.jsonl", SAME_ID, "second caption for '0100'"),
        (results, "a.jsonl", '{"image_id": "a", "caption": "x"}', "'a'.*COCO_val2014_000000000100.jpg or 100"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(read, name, content, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read(path.parent if "/" in name else path)


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
