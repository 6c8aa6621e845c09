"""The GenEval command on folders of images, with a tiny detector and with detections from a file."""

import json
import shutil

import numpy as np
import pytest

from eval.benchmarks.geneval import main
from eval.benchmarks.geneval_rules import TAGS, DetectedObject
from eval.scores import read_scores
from tests.eval.benchmarks.test_geneval_rules import group
from tests.helpers import tiny_judges
from um3.core.errors import UserError
from um3.inference.image_io import save_png


def prompt(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more, "prompt": f"the prompt of {tag}"}


PROMPTS = [
    prompt("single_object", group("dog")),
    prompt("two_object", group("dog"), group("cat")),
    prompt("counting", group("dog", 2), exclude=[group("dog", 3)]),
    prompt("colors", group("dog", color="red")),
    prompt("position", group("dog"), group("cat", position=["left of", 0])),
    prompt("color_attr", group("dog", color="red"), group("cat", color="blue")),
]
RIGHT = [
    [("dog", 0, "")],
    [("dog", 0, ""), ("cat", 50, "")],
    [("dog", 0, ""), ("dog", 50, "")],
    [("dog", 0, "red")],
    [("dog", 50, ""), ("cat", 0, "")],
    [("dog", 0, "red"), ("cat", 50, "blue")],
]
FILES = [[f"{index:05d}/samples/{copy:04d}.png" for copy in range(4)] for index in range(len(PROMPTS))]


@pytest.fixture
def images(tmp_path):
    """GenEval's own layout without a manifest: four images for a prompt of each task."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for index, (prompt, files) in enumerate(zip(PROMPTS, FILES, strict=True)):
        for file in files:
            save_png(generator.integers(0, 256, (40, 40, 3)).astype(np.uint8), folder / file)
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(prompt))
    return folder


def detections(path, *, wrong=(), colours=True):
    """Right objects for every image but those in `wrong`, which show nothing."""
    rows = []
    for files, right in zip(FILES, RIGHT, strict=True):
        boxes = [{"class": name, "box": [x, 0, x + 10, 10], "color": color * colours} for name, x, color in right]
        objects = [box | {"score": 0.95} for box in boxes]
        rows += [{"file": file, "objects": [] if file in wrong else objects} for file in files]
    return tiny_judges.write_lines(path, rows)


def scored(images, *options):
    main([f"images={images}", *options])
    return {row.metric: row for row in read_scores(f"{images}.json")}


def values(rows):
    return {name: row.value for name, row in rows.items()}


def test_the_mean_is_over_tasks_and_its_interval_over_prompts(images, tmp_path):
    rows = scored(images, f"detections={detections(tmp_path / 'd.jsonl')}")
    assert values(rows) == dict.fromkeys((*TAGS, "mean"), 1.0)
    assert rows["mean"].n == 24 and rows["colors"].n == 4 and rows["mean"].paper == 0.48
    path = detections(tmp_path / "d.jsonl", wrong=[*FILES[0][:1], *FILES[2][:3], *FILES[5]])
    rows = scored(images, f"detections={path}")
    assert [rows[tag].value for tag in TAGS] == [0.75, 1, 0.25, 1, 1, 0]
    assert rows["mean"].value == pytest.approx(4 / 6)
    assert rows["mean"].low < 4 / 6 < rows["mean"].high and rows["counting"].low is None
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert values(scored(images, f"detections={path}")) == values(rows), "in any order"


def test_missing_images_are_named_counted_and_not_averaged_in(images, tmp_path):
    path = detections(tmp_path / "d.jsonl")
    lines = path.read_text().splitlines()
    broken = json.dumps({"file": FILES[1][1], "objects": [{"class": "dog"}]})
    path.write_text("\n".join([*lines[1:5], broken, *lines[6:], "{"]))
    (images / "00003" / "metadata.jsonl").write_text('{"tag": "colors"')
    rows = scored(images, f"detections={path}")
    assert rows["single_object"].value == 1 and (rows["single_object"].n, rows["single_object"].skipped) == (3, 1)
    assert rows["colors"].value is None and rows["mean"].value is None and "missing: colors" in rows["mean"].note
    skipped = json.loads((images.with_name("images.json")).read_text())["skipped"]
    assert {reason: entry["first"] for reason, entry in skipped.items()} == {
        "unreadable metadata": ["00003/metadata.jsonl"],
        "entry without file and objects": [f"{path}:24"],
        "no objects supplied": [FILES[0][0]],
        "objects without class, score and box": [FILES[1][1]],
    }


def test_without_colours_the_tasks_that_need_them_have_no_value(images, tmp_path):
    rows = scored(images, f"detections={detections(tmp_path / 'd.jsonl', colours=False)}")
    assert rows["colors"].value is rows["color_attr"].value is rows["mean"].value is None
    assert "clip-vit-large-patch14" in rows["colors"].note and rows["position"].value == 1


def test_a_detector_and_a_clip_judge_every_image_once(images, tmp_path, capfd):
    detector = tiny_judges.save_mask2former(tmp_path / "detector", sharpness=40)
    clip = tiny_judges.save_clip(tmp_path / "clip")
    for index in (1, 2, 4, 5):
        shutil.rmtree(images / f"{index:05d}")
    (images / FILES[0][0]).unlink()
    (images / FILES[0][1]).write_bytes(b"no image")
    options = (f"detector={detector}", f"clip={clip}")
    first = scored(images, *options)
    assert first["single_object"].n == 2 and first["single_object"].skipped == 2 and first["colors"].n == 4
    judge = first["colors"].protocol["judge"]
    assert "transformers Mask2Former" in judge and "CLIP" in judge
    output = capfd.readouterr()
    assert "missing image (1" in output.out and "unreadable image: not an image (1" in output.out
    assert "detect objects 8/8" in output.err
    again = scored(images, *options)
    assert values(again) == values(first) and "detect objects" not in capfd.readouterr().err


def test_generated_folders_are_scored_as_they_are(um3_folder, tmp_path):
    from eval.tasks.generate_images import main as generate

    prompts = tiny_judges.write_lines(tmp_path / "metadata.jsonl", PROMPTS)
    images, path = tmp_path / "images", detections(tmp_path / "d.jsonl")
    options = ("layout=geneval", "num_images=4")
    generate([f"model={um3_folder}", f"prompts={prompts}", f"output_dir={images}", *options])
    rows = scored(images, f"detections={path}")
    assert rows["mean"].value == 1 and rows["mean"].protocol["temperature"] == 1.0 and rows["mean"].seed == 0
    pins = json.loads(images.with_name("images.json").read_text())["pins"]
    assert {"seed", "objects_sha256"} < pins.keys() and len(pins) == 4
    shutil.rmtree(images / "00002")
    rows = scored(images, f"detections={path}")
    assert rows["counting"].value is None and rows["mean"].value is None


def test_without_a_detector_the_notes_name_the_remedy(images, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    for options, note in (
        ([], "mask2former-swin-small-coco-instance"),
        ([f"detector={tmp_path / 'weights'}"], f"{tmp_path / 'weights' / 'model.safetensors'} is damaged"),
    ):
        rows = scored(images, *options)
        assert set(rows) == {*TAGS, "mean"} and all(row.value is None and note in row.note for row in rows.values())
    with pytest.raises(UserError, match="no weights"):
        scored(images, f"detector={images}")


def test_a_corrected_prompt_is_judged_again(images, tmp_path, monkeypatch):
    """Colours are looked at only where a prompt names one."""

    def found(image, *, requirement, **_):
        return [DetectedObject("dog", 0.99, (0, 0, 4, 4), "red" if requirement.needs_colour else "")]

    monkeypatch.setattr("eval.benchmarks.detector.objects_of", found)
    monkeypatch.setattr("eval.benchmarks.detector.Mask2Former", lambda path: None)
    monkeypatch.setattr("eval.metrics.clipscore.load_clip", lambda path: None)
    options = ("detector=some/detector", "clip=some/clip")
    assert scored(images, *options)["single_object"].value == 1
    for index in range(len(PROMPTS)):
        row = prompt("colors", group("dog", color="red"))
        (images / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(row))
    assert scored(images, *options)["colors"].value == pytest.approx(1)
