import json

import pytest

from eval.tasks.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.txt",
            "a red circle\n\n two\u2028blue  squares \r\na cross",
            "00000: a red circle|00001: two blue squares|00002: a cross",
        ),
        ("a.jsonl", '{"tag": "x", "prompt": "a dog"}\n{"id": 7, "caption": "a cat"}\n', "00000: a dog|7: a cat"),
        ("coco.csv", 'Prompt\n"a ""big"" dog, a cat"\na bird\n', '00000: a "big" dog, a cat|00001: a bird'),
        ("dpg.csv", "item_id,text,n\nx1,long one,1\nx1,long one,2\nx2,another,1\n", "x1: long one|x2: another"),
        ("parti.tsv", 'Prompt\tCategory\na 5" lion\tAnimals\n"two" words\tB\n', '00000: a 5" lion|00001: "two" words'),
        ("folder/b.txt", "a prompt\n", "a: before|b: a prompt"),
    ],
)
def test_prompts_of_every_form(name, content, expected, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    if name == "folder/b.txt":
        path = path.parent
        (path / "a.txt").write_text("before\n")
    prompts = read_prompts(path)
    assert "|".join(f"{prompt.id}: {prompt.text}" for prompt in prompts) == expected
    assert read_prompts(path, limit=1) == prompts[:1]
    assert [prompt.line for prompt in prompts] == (content.splitlines() if name == "a.jsonl" else [""] * len(prompts))


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
