"""The captioning command: the model's captions or a file's, resumable, the same on one process and on two."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval.benchmarks.coco_captions import main
from eval.metrics.captions import meteor_score
from eval.scores import read_scores
from tests.helpers.tiny_judges import write_lines
from um3.core.distributed import free_port
from um3.core.errors import UserError
from um3.inference.image_io import save_png

ROOT = Path(__file__).parents[3]
COCO_DEMO = ROOT.parent / "shared/data/bench/coco_caption_demo.json.gz"


@pytest.fixture
def data(scenes, tmp_path):
    """Ten scenes with all their captions, in Karpathy's form."""
    rows = []
    for index, (image, captions) in enumerate(zip(scenes[0][:10], scenes[1], strict=False)):
        save_png(image, tmp_path / "val2014" / f"{index}.png")
        sentences = [{"raw": caption} for caption in captions]
        rows.append(
            {
                "filepath": "val2014",
                "filename": f"{index}.png",
                "cocoid": index,
                "split": "test",
                "sentences": sentences,
            }
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    return tmp_path / "dataset_coco.json"


def scored(data, *options):
    out = data.with_name("captions.json")
    main([f"references={data}", f"output_dir={out}", *options])
    return {row.metric: row for row in read_scores(out)}


def truth(data):
    return [row["sentences"][0]["raw"] for row in json.loads(data.read_text())["images"]]


def test_captions_of_the_model_are_those_of_its_pipeline(data, pipeline, scenes, um3_folder):
    rows = scored(data, f"model={um3_folder}", "max_new_tokens=6", "batch_size=4")
    samples = json.loads(data.with_name("captions.json").read_text())["samples"]
    assert [each["caption"] for each in samples] == pipeline.caption(scenes[0][:10], max_new_tokens=6)
    protocol = rows["cider"].protocol
    assert protocol["decoding"] == "greedy" and protocol["max_new_tokens"] == 6 and protocol["split"] == "test"
    assert protocol["prompt"] and protocol["style"] and protocol["references_sha256"]
    assert json.loads(data.with_name("captions.json").read_text())["pins"]["model_sha256"]
    assert rows["bleu_4"].n == 10 and rows["bleu_4"].paper == 0.086 and "captions.meteor=true" in rows["meteor"].note


def test_a_killed_run_captions_only_the_rest(data, um3_folder, capfd):
    first = scored(data, f"model={um3_folder}", "max_new_tokens=6")
    lines = data.with_name("captions.captions.jsonl")
    kept = lines.read_text().splitlines()
    lines.write_text("\n".join(kept[:6]) + "\n" + kept[6][:20])
    capfd.readouterr()
    again = scored(data, f"model={um3_folder}", "max_new_tokens=6")
    assert {n: r.value for n, r in again.items()} == {n: r.value for n, r in first.items()}
    assert len(lines.read_text().splitlines()) == 7 + 4 and "caption images 10/10" in capfd.readouterr().err


def test_sampled_captions_do_not_depend_on_where_a_run_stopped(data, um3_folder):
    options = (f"model={um3_folder}", "max_new_tokens=6", "temperature=1.0", "batch_size=3")
    first = scored(data, *options)
    lines = data.with_name("captions.captions.jsonl")
    lines.write_text("\n".join(lines.read_text().splitlines()[5:]) + "\n")
    again = scored(data, *options)
    assert again["rouge_l"].value == first["rouge_l"].value and again["rouge_l"].protocol == first["rouge_l"].protocol
    assert "temperature 1.0" in first["rouge_l"].protocol["decoding"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(data, um3_folder):
    alone = scored(data, f"model={um3_folder}", "max_new_tokens=6", "batch_size=2")
    for file in data.parent.glob("captions.*"):
        file.unlink()
    arguments = [
        f"references={data}",
        f"out={data.with_name('captions.json')}",
        f"model={um3_folder}",
        "max_new_tokens=6",
    ]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eval.benchmarks.coco_captions", *arguments]
    environments = [{**os.environ, **shared, "RANK": rank} for rank in ("0", "1")]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for environment in environments]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert len(list(data.parent.glob("captions.captions.rank*.jsonl"))) == 2
    both = {row.metric: row for row in read_scores(data.with_name("captions.json"))}
    assert {n: (r.value, r.n) for n, r in both.items()} == {n: (r.value, r.n) for n, r in alone.items()}


@pytest.mark.parametrize("form", ["coco", "lines"])
def test_captions_from_a_file(data, form):
    texts = truth(data)
    if form == "coco":
        given = data.with_name("results.json")
        given.write_text(json.dumps([{"image_id": index, "caption": text} for index, text in enumerate(texts)][::-1]))
    else:
        rows = [{"file": f"val2014/{index}.png", "caption": text} for index, text in enumerate(texts)]
        given = write_lines(data.with_name("results.jsonl"), rows[::-1])
    rows = scored(data, f"captions={given}")
    assert rows["exact_match"].value == 1 and rows["bleu_1"].value == pytest.approx(1) and rows["cider"].value > 1


def test_what_is_missing_or_empty_is_named_and_counted(data, um3_folder):
    texts = truth(data)
    texts[3] = " . "
    results = [{"image_id": index, "caption": text} for index, text in enumerate(texts)][:8]
    data.with_name("results.json").write_text(json.dumps(results))
    rows = scored(data, f"captions={data.with_name('results.json')}")
    assert (rows["cider"].n, rows["cider"].skipped) == (8, 2) and rows["exact_match"].value == 7 / 8
    assert "2 left out: no caption supplied (2, such as val2014/8.png)" in rows["cider"].note
    assert "1 of 8 captions are empty and count as wrong" in rows["cider"].note
    (data.parent / "val2014" / "4.png").unlink()
    (data.parent / "val2014" / "5.png").write_bytes(b"no image")
    rows = scored(data, f"model={um3_folder}", "max_new_tokens=4")
    assert (rows["cider"].n, rows["cider"].skipped) == (8, 2)
    assert "missing image (1, such as val2014/4.png)" in rows["cider"].note
    assert "unreadable image: not an image (1, such as val2014/5.png)" in rows["cider"].note


def test_any_folder_with_captions_beside_its_images(scenes, tmp_path, um3_folder):
    for index, (image, captions) in enumerate(zip(scenes[0][:4], scenes[1], strict=False)):
        save_png(image, tmp_path / "photos" / f"{index}.png")
        (tmp_path / "photos" / f"{index}.txt").write_text("\n".join(captions))
    main([f"references={tmp_path / 'photos'}", f"model={um3_folder}", f"out={tmp_path / 'o.json'}", "max_new_tokens=4"])
    assert read_scores(tmp_path / "o.json")[0].n == 4


def test_the_published_example_of_the_coco_tools(tmp_path):
    if not COCO_DEMO.exists():
        pytest.skip(f"{COCO_DEMO.name} is not here")
    demo = json.loads(gzip.decompress(COCO_DEMO.read_bytes()))
    (tmp_path / "refs.json").write_text(json.dumps(demo["refs"]))
    write_lines(tmp_path / "hyps.jsonl", [{"file": name, "caption": text} for name, text in demo["hyps"].items()])
    main([f"references={tmp_path / 'refs.json'}", f"captions={tmp_path / 'hyps.jsonl'}", f"out={tmp_path / 'o.json'}"])
    found = {row.metric: row.value for row in read_scores(tmp_path / "o.json")}
    published = {"bleu_1": 0.579, "bleu_2": 0.404, "bleu_3": 0.279, "bleu_4": 0.191, "rouge_l": 0.396, "cider": 0.600}
    assert {name: found[name] for name in published} == pytest.approx(published, abs=1e-3)


@pytest.mark.slow
def test_the_published_meteor_also_where_decimals_have_a_comma(monkeypatch):
    if not COCO_DEMO.exists() or shutil.which("java") is None:
        pytest.skip("needs Java and the published example")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    demo = json.loads(gzip.decompress(COCO_DEMO.read_bytes()))
    keys = list(demo["refs"])
    found = meteor_score([demo["hyps"][key] for key in keys], references=[demo["refs"][key] for key in keys])
    assert found == pytest.approx(0.195, abs=5e-4)


def test_mistakes_are_one_line(data, tmp_path):
    out = f"out={tmp_path / 'o.json'}"
    for arguments, message in (
        ([], "set references=FILE"),
        ([f"references={data}"], "set either model=FOLDER"),
        ([f"references={data}", "model=a", "captions=b"], "set either model=FOLDER"),
        ([f"references={data}", "model=a"], "set out=FILE"),
        ([f"references={data}", "model=nowhere", out], "no UM3 model in nowhere"),
        ([f"references={data}", "captions=nowhere.json", out], "nowhere.json cannot be read as"),
        ([f"references={data}", "captions=nowhere.jsonl", out], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
