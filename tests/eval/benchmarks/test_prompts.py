import json
from pathlib import Path

import pytest

from eval.benchmarks.prompts import read_prompts
from um3.core.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data/prompts"


def texts(path, **options):
    return [prompt.text for prompt in read_prompts(path, **options)]


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n two\u2028blue  squares \r\na cross")
    prompts = read_prompts(tmp_path / "a.txt")
    assert [each[:2] for each in prompts] == [
        ("00000", "a red circle"),
        ("00001", "two blue squares"),
        ("00002", "a cross"),
    ]
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
    assert [each[:2] for each in read_prompts(tmp_path / "dpg.csv")] == [("x1", "long one"), ("x2", "another")]
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na lion\tAnimals\n")
    assert texts(tmp_path / "parti.tsv") == ["a lion"]
    for name in ("b", "a"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{name}.txt").write_text(f"prompt {name}\n")
    assert [each[:2] for each in read_prompts(tmp_path / "folder")] == [("a", "prompt a"), ("b", "prompt b")]


def test_coco_gives_one_caption_of_each_image_in_a_seeded_order(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": f"{i}.jpg",
            "cocoid": i,
            "sentences": [{"raw": f"{i} a"}, {"raw": f"{i} b"}],
        }
        for i in range(20)
    ]
    images.append({**images[0], "filepath": "train2014", "cocoid": 99})
    images.append({**images[0], "cocoid": 98, "sentences": []})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    chosen = read_prompts(tmp_path / "dataset_coco.json", limit=10)
    assert len({each.id for each in chosen}) == 10 and all(each.text.split()[0] == each.id for each in chosen)
    assert (
        chosen == read_prompts(tmp_path / "dataset_coco.json")[:10]
        and len(read_prompts(tmp_path / "dataset_coco.json")) == 20
    )
    assert chosen != read_prompts(tmp_path / "dataset_coco.json", limit=10, seed=1)
    notes = [{"image_id": i, "caption": f"{i} {kind}"} for i in range(20) for kind in "ab"]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": [], "annotations": notes}))
    assert read_prompts(tmp_path / "captions_val2014.json", limit=10) == chosen


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("a.txt", "", "holds no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a.jsonl:2 is no JSON object with a prompt"),
        ("a.jsonl", '{"tag": "colors"}\n', r"a.jsonl:1 is no JSON object with a prompt"),
        ("a.jsonl", '{"prompt": " "}\n', "prompt 1 .00000. is empty"),
        ("a.jsonl", '{"id": "../x", "prompt": "a"}\n', "cannot name prompt 1"),
        ("a.jsonl", '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n', "'x' cannot name prompt 2"),
        ("a.csv", "words\na\n", "cannot be read as prompts"),
        ("a.json", "[]", "cannot be read as prompts"),
    ],
)
def test_what_is_no_list_of_prompts_is_one_line(tmp_path, name, content, message):
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
