import json
from pathlib import Path

import pytest

from eval.tasks.prompts import read_prompts
from um3.core.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data/prompts"


def texts(path, **options):
    return [prompt.text for prompt in read_prompts(path, **options)]


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n two\u2028blue  squares \r\na cross")
    prompts = read_prompts(tmp_path / "a.txt")
    assert [prompt.id for prompt in prompts] == ["00000", "00001", "00002"]
    assert [prompt.text for prompt in prompts] == ["a red circle", "two blue squares", "a cross"]
    assert texts(tmp_path / "a.txt", limit=1) == ["a red circle"]


def test_json_lines_keep_their_line(tmp_path):
    lines = ['{"tag": "colors", "prompt": "a red dog"}', '{"id": 7, "caption": "a cat"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    first, second = read_prompts(tmp_path / "a.jsonl")
    assert (first.id, first.text, first.line) == ("00000", "a red dog", lines[0]) and second[:2] == ("7", "a cat")


def test_tables_and_folders(tmp_path):
    (tmp_path / "coco.csv").write_text('Prompt\n"a dog, a cat"\na bird\n')
    assert texts(tmp_path / "coco.csv") == ["a dog, a cat", "a bird"]
    (tmp_path / "dpg.csv").write_text("item_id,text,proposition_id\nx1,long one,1\nx1,long one,2\nx2,another,1\n")
    assert [prompt[:2] for prompt in read_prompts(tmp_path / "dpg.csv")] == [("x1", "long one"), ("x2", "another")]
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na lion\tAnimals\n")
    assert texts(tmp_path / "parti.tsv") == ["a lion"]
    for name in ("b", "a"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{name}.txt").write_text(f"prompt {name}\n")
    assert [prompt[:2] for prompt in read_prompts(tmp_path / "folder")] == [("a", "prompt a"), ("b", "prompt b")]


def test_coco_gives_one_caption_of_each_image_in_a_seeded_order(tmp_path):
    name = {"filepath": "val2014", "filename": "x.jpg"}
    images = [{**name, "cocoid": i, "sentences": [{"raw": f"{i} a"}, {"raw": f"{i} b"}]} for i in range(20)]
    images.append({**images[0], "filepath": "train2014", "cocoid": 99})
    images.append({**images[0], "cocoid": 98, "sentences": []})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    chosen = read_prompts(tmp_path / "dataset_coco.json", limit=10)
    assert len({prompt.id for prompt in chosen}) == 10 and all(prompt.text.split()[0] == prompt.id for prompt in chosen)
    every_image = read_prompts(tmp_path / "dataset_coco.json")
    assert chosen == every_image[:10] and len(every_image) == 20
    assert chosen != read_prompts(tmp_path / "dataset_coco.json", limit=10, seed=1)
    divided = [{**image, "sentences": [text]} for image in images for text in image["sentences"]]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": divided}))
    assert read_prompts(tmp_path / "dataset_coco.json") == every_image
    notes = [{"image_id": i, "caption": f"{i} {kind}"} for i in range(20) for kind in "ab"]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": [], "annotations": notes}))
    assert read_prompts(tmp_path / "captions_val2014.json", limit=10) == chosen


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("a.txt", "", "contains no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2: expected an object with a text"),
        ("a.jsonl", '{"tag": "colors"}\n', "a.jsonl:1: expected an object with a text"),
        ("a.jsonl", '{"prompt": " "}\n', "prompt 1 .00000. is empty"),
        ("a.jsonl", '{"id": "../x", "prompt": "a"}\n', "id '../x' of prompt 1 must be unique and a valid file name"),
        ("a.jsonl", '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n', "id 'x' of prompt 2 must be unique"),
        ("a.csv", "words\na\n", "a.csv, record 1: expected an object with a text"),
        ("a.json", "7", "cannot be read as prompts"),
    ],
)
def test_other_forms_are_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "count"),
    [("geneval_evaluation_metadata.jsonl", 553), ("dpg_bench_prompts.jsonl", 1065), ("PartiPrompts.tsv", 1632)],
)
def test_the_published_lists_are_whole(name, count):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here")
    assert len(read_prompts(SHARED / name)) == count
