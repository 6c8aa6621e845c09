"""The captioning command: the model's captions or a file's, resumable, the same on one process and on two."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from eval.benchmarks.coco_captions import main
from eval.metrics.captions import meteor_score
from eval.scores import read_scores
from tests.helpers.tiny_judges import write_lines
from tests.train.conftest import train_apart
from um3.inference.image_io import save_png

COCO_DEMO = Path(__file__).parents[4] / "shared/data/bench/coco_caption_demo.json.gz"


@pytest.fixture
def data(scenes, tmp_path):
    """Ten scenes with all their captions, in Karpathy's form."""
    entries = []
    for index, (image, captions) in enumerate(zip(scenes[0][:10], scenes[1], strict=False)):
        name = {"filepath": "val2014", "filename": f"{index}.png", "cocoid": index, "split": "test"}
        save_png(image, tmp_path / "val2014" / f"{index}.png")
        entries.append({**name, "sentences": [{"raw": caption} for caption in captions]})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    return tmp_path / "dataset_coco.json"


def scored(data, *options):
    output = data.with_name("captions.json")
    main([f"references={data}", f"output={output}", *options])
    return {row.metric: row for row in read_scores(output)}


def values(rows):
    return {name: (row.value, row.n) for name, row in rows.items()}


def true_captions(data):
    return [entry["sentences"][0]["raw"] for entry in json.loads(data.read_text())["images"]]


def test_captions_of_the_model_are_those_of_its_pipeline(data, pipeline, scenes, um3_folder, capfd):
    options = (f"model={um3_folder}", "max_new_tokens=6", "batch_size=4")
    rows = scored(data, *options)
    result = json.loads(data.with_name("captions.json").read_text())
    assert [sample["caption"] for sample in result["samples"]] == pipeline.caption(scenes[0][:10], max_new_tokens=6)
    protocol = rows["cider"].protocol
    assert protocol["decoding"] == "greedy" and protocol["max_new_tokens"] == 6 and protocol["split"] == "test"
    assert protocol["prompt"] and protocol["style"] and protocol["references_sha256"] and result["pins"]["model_sha256"]
    assert rows["bleu_4"].n == 10 and rows["bleu_4"].paper == 0.086 and "captions.meteor=true" in rows["meteor"].note
    assert "caption images 10/10" in capfd.readouterr().err


def test_sampled_captions_do_not_depend_on_where_a_run_was_killed(data, um3_folder):
    options = (f"model={um3_folder}", "max_new_tokens=6", "temperature=1.0", "batch_size=3")
    first = scored(data, *options)["rouge_l"]
    lines = data.with_name("captions.cache.jsonl")
    lines.write_text("\n".join(lines.read_text().splitlines()[5:]) + "\n")
    assert scored(data, *options)["rouge_l"] == first and "temperature 1.0" in first.protocol["decoding"]


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(data, um3_folder):
    arguments = [f"model={um3_folder}", "max_new_tokens=6", "batch_size=2"]
    alone = scored(data, *arguments)
    for file in data.parent.glob("captions.*json*"):
        file.unlink()
    command = ["coco-captions", *arguments, f"references={data}", f"output={data.with_name('captions.json')}"]
    train_apart(command, processes=2, launcher=("-m", "eval"))
    assert len(list(data.parent.glob("captions.cache.rank*.jsonl"))) == 2
    assert values({row.metric: row for row in read_scores(data.with_name("captions.json"))}) == values(alone)


def test_captions_from_a_file(data):
    rows = [{"file": f"val2014/{index}.png", "caption": text} for index, text in enumerate(true_captions(data))]
    rows = scored(data, f"captions={write_lines(data.with_name('results.jsonl'), rows[::-1])}")
    assert rows["exact_match"].value == 1 and rows["bleu_1"].value == pytest.approx(1) and rows["cider"].value > 1


def test_missing_and_empty_captions_are_named_and_counted(data):
    captions = true_captions(data)
    captions[3] = " . "
    results = [{"image_id": index, "caption": text} for index, text in enumerate(captions)][:8]
    data.with_name("results.json").write_text(json.dumps(results))
    cider = (rows := scored(data, f"captions={data.with_name('results.json')}"))["cider"]
    assert (cider.n, cider.skipped) == (8, 2) and rows["exact_match"].value == 7 / 8
    assert "no caption supplied (2, such as val2014/8.png)" in cider.note and "1 of 8 captions are empty" in cider.note


def test_the_published_example_of_the_coco_tools(tmp_path):
    if not COCO_DEMO.exists():
        pytest.skip(f"{COCO_DEMO.name} is not here")
    demo = json.loads(gzip.decompress(COCO_DEMO.read_bytes()))
    (tmp_path / "refs.json").write_text(json.dumps(demo["refs"]))
    write_lines(tmp_path / "hyps.jsonl", [{"file": name, "caption": text} for name, text in demo["hyps"].items()])
    rows = scored(tmp_path / "refs.json", f"captions={tmp_path / 'hyps.jsonl'}")
    published = {"bleu_1": 0.579, "bleu_2": 0.404, "bleu_3": 0.279, "bleu_4": 0.191, "rouge_l": 0.396, "cider": 0.600}
    assert {name: rows[name].value for name in published} == pytest.approx(published, abs=1e-3)


@pytest.mark.slow
def test_the_published_meteor_also_in_a_locale_with_a_decimal_comma(monkeypatch):
    if not COCO_DEMO.exists() or shutil.which("java") is None:
        pytest.skip("needs Java and the published example")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    demo = json.loads(gzip.decompress(COCO_DEMO.read_bytes()))
    keys = list(demo["refs"])
    meteor = meteor_score([demo["hyps"][key] for key in keys], references=[demo["refs"][key] for key in keys])
    assert meteor == pytest.approx(0.195, abs=5e-4)
