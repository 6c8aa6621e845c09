"""The DPG-Bench command on folders of grids, with answers from a file and from tiny vision-language models."""

import json

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.dpg import crops, main
from eval.scores import read_scores
from eval.tasks.generated_images import grid
from tests.eval.benchmarks.test_dpg_rules import ROWS, write
from tests.helpers import tiny_judges
from um3.inference.image_io import save_png

SAVES = [tiny_judges.save_llava, tiny_judges.save_blip]


def tiles():
    return [np.full((32, 32, 3), 60 * copy, dtype=np.uint8) for copy in range(4)]


@pytest.fixture
def images(tmp_path):
    for item in ("a", "b"):
        save_png(grid(tiles()), tmp_path / "images" / f"{item}.png")
    return tmp_path / "images"


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "dpg_bench.csv", ROWS)


def scored(images, *options):
    main([f"images={images}", *options])
    return {row.metric: row for row in read_scores(f"{images}.json")}


def answers(path, a, b):
    rows = [{"file": "a.png", "answers": a}, {"file": "b.png", "answers": b}]
    return tiny_judges.write_lines(path, [row for row in rows if row["answers"] is not None])


YES_A, YES_B = {"1": "yes", "2": "yes", "3": "yes"}, {"1": True, "2": True}


def test_a_grid_is_cut_as_it_was_written():
    cut = crops(Image.fromarray(grid(tiles())), side=0, count=3)
    assert [np.asarray(crop)[0, 0, 0] for crop in cut] == [0, 60, 120] and cut[0].size == (32, 32)
    assert crops(Image.fromarray(grid(tiles())), side=16, count=4) == []
    assert crops(Image.new("RGB", (64, 32)), side=0, count=4) == []
    whole, sheet = Image.new("RGB", (32, 32)), Image.fromarray(grid(tiles()))
    assert crops(whole, side=32, count=1) == [whole] and crops(sheet, side=32, count=1)[0].size == (32, 32)


def test_answers_from_a_file(images, questions, tmp_path):
    path = answers(tmp_path / "a.jsonl", [YES_A, {**YES_A, "1": "no"}], [YES_B, {**YES_B, "2": False}])
    rows = scored(images, f"questions={questions}", f"answers={path}", "num_images=2")
    assert rows["overall"].value == pytest.approx((0.5 + 0.75) / 2) and rows["overall"].n == 2
    assert rows["entity"].value == rows["attribute"].value == rows["other"].value == 0.5 and rows["global"].value == 1
    assert rows["overall"].paper == 0.7817 and rows["overall"].shown() == "62.5"
    official = scored(images, f"questions={questions}", f"answers={path}", "num_images=2", "official=true")
    assert official["overall"].value == 0.75 and official["other"].value == 0, "without a's first question, and a"
    assert "no answer to a question, or to one it depends on (1, such as a)" in official["overall"].note
    assert official["overall"].protocol_hash != rows["overall"].protocol_hash


def test_prompts_without_image_or_answer_are_named_and_counted(images, questions, tmp_path):
    path = answers(tmp_path / "a.jsonl", [YES_A], None)
    rows = scored(images, f"questions={questions}", f"answers={path}")
    assert (rows["overall"].value, rows["overall"].n, rows["overall"].skipped) == (1.0, 1, 1)
    assert "no answers supplied (1, such as b.png)" in rows["overall"].note
    path = answers(tmp_path / "a.jsonl", [{"1": "yes"}], [{"1": "perhaps", "2": "yes"}])
    rows = scored(images, f"questions={questions}", f"answers={path}")
    assert rows["overall"].value is None
    assert "no answer to a question, or to one it depends on (1, such as a)" in rows["overall"].note
    assert "answers other than yes and no (1, such as b.png)" in rows["overall"].note


@pytest.mark.parametrize("save", SAVES)
def test_any_vision_language_model_answers_once(images, questions, tmp_path, capfd, save):
    model = save(tmp_path / "model")
    save_png(np.zeros((32, 64, 3), dtype=np.uint8), images / "b.png")
    rows = scored(images, f"questions={questions}", f"vqa={model}")
    assert rows["overall"].n == 1 and "image of another size (1, such as b.png)" in rows["overall"].note
    lines = [json.loads(line) for line in images.with_name("images.cache.jsonl").read_text().splitlines()[1:]]
    assert [[sorted(image) for image in line["result"]["value"]] for line in lines] == [[["1", "2", "3"]] * 4, []]
    assert "answer questions 2/2" in capfd.readouterr().err
    again = scored(images, f"questions={questions}", f"vqa={model}")
    assert again["overall"].value == rows["overall"].value and "answer questions" not in capfd.readouterr().err


def test_without_a_model_the_notes_name_the_remedy(images, questions, tmp_path):
    assert "dpg_bench.csv" in scored(images)["overall"].note
    assert "answers=FILE.jsonl" in scored(images, f"questions={questions}")["overall"].note
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    row = scored(images, f"questions={questions}", f"vqa={tmp_path / 'model'}")["overall"]
    assert row.value is None and "is damaged" in row.note
