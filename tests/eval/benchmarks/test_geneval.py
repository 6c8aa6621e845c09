"""The GenEval command on folders of images, with a tiny detector and with detections from a file."""

import json
import shutil

import numpy as np
import pytest

from eval.benchmarks.geneval import main
from eval.benchmarks.geneval_rules import TAGS
from eval.scores import read_scores
from tests.helpers import tiny_judges
from um3.core.errors import UserError
from um3.inference.image_io import save_png


def group(name, count=1, **more):
    return {"class": name, "count": count, **more}


def prompt(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more, "prompt": f"what {tag} asks for"}


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
    """GenEval's own layout, without a manifest: four images for a prompt of each task."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for index, (prompt, files) in enumerate(zip(PROMPTS, FILES, strict=True)):
        for file in files:
            save_png(generator.integers(0, 256, (40, 40, 3)).astype(np.uint8), folder / file)
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(prompt))
    return folder


def line(file, objects):
    boxes = [{"class": name, "score": 0.95, "box": [x, 0, x + 10, 10], "color": color} for name, x, color in objects]
    return {"file": file, "objects": boxes}


def detections(path, *, wrong=()):
    """Right objects for every image but those in `wrong`, which show nothing."""
    rows = [line(f, [] if f in wrong else RIGHT[index]) for index, files in enumerate(FILES) for f in files]
    return tiny_judges.write_lines(path, rows)


def scored(images, *options):
    main([f"images={images}", *options])
    return {row.metric: row for row in read_scores(f"{images}.json")}


def test_right_objects_are_right_images(images, tmp_path):
    rows = scored(images, f"detections={detections(tmp_path / 'd.jsonl')}")
    assert {name: row.value for name, row in rows.items()} == dict.fromkeys((*TAGS, "mean"), 1.0)
    assert rows["mean"].n == 24 and rows["colors"].n == 4 and rows["mean"].paper == 0.48


def test_the_mean_is_over_tasks_and_its_interval_over_prompts(images, tmp_path):
    wrong = [*FILES[0][:1], *FILES[2][:3], *FILES[5]]
    rows = scored(images, f"detections={detections(tmp_path / 'd.jsonl', wrong=wrong)}")
    assert [rows[tag].value for tag in TAGS] == [0.75, 1, 0.25, 1, 1, 0]
    assert rows["mean"].value == pytest.approx(4 / 6)
    assert rows["mean"].low < 4 / 6 < rows["mean"].high and rows["counting"].low is None, (
        "a single prompt has no spread"
    )


def test_the_order_of_the_detections_does_not_matter(images, tmp_path):
    path = detections(tmp_path / "d.jsonl", wrong=FILES[1][:2])
    first = scored(images, f"detections={path}")
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    again = scored(images, f"detections={path}")
    assert {name: row.value for name, row in first.items()} == {name: row.value for name, row in again.items()}


def test_what_is_missing_is_named_counted_and_not_averaged_in(images, tmp_path):
    path = detections(tmp_path / "d.jsonl")
    lines = path.read_text().splitlines()
    broken = json.dumps({"file": FILES[1][1], "objects": [{"class": "dog"}]})
    path.write_text("\n".join([*lines[1:5], broken, *lines[6:], "{"]))
    (images / "00003" / "metadata.jsonl").write_text('{"tag": "colors"')
    rows = scored(images, f"detections={path}")
    assert rows["single_object"].value == 1 and (rows["single_object"].n, rows["single_object"].skipped) == (3, 1)
    assert rows["colors"].value is None and rows["mean"].value is None and "missing: colors" in rows["mean"].note
    left_out = json.loads((images.with_name("images.json")).read_text())["left_out"]
    assert {reason: each["first"] for reason, each in left_out.items()} == {
        "unreadable metadata": ["00003/metadata.jsonl"],
        "line without file and objects": [f"{path}:24"],
        "no objects supplied": [FILES[0][0]],
        "objects without class, score and box": [FILES[1][1]],
    }


def test_without_colours_the_tasks_that_need_them_are_holes(images, tmp_path):
    rows = [line(f, [(name, x, "") for name, x, _ in RIGHT[index]]) for index, files in enumerate(FILES) for f in files]
    found = scored(images, f"detections={tiny_judges.write_lines(tmp_path / 'd.jsonl', rows)}")
    assert found["colors"].value is found["color_attr"].value is found["mean"].value is None
    assert "clip-vit-large-patch14" in found["colors"].note and found["position"].value == 1


def test_without_a_detector_every_row_says_how_to_provide_one(images):
    rows = scored(images)
    assert all(row.value is None and "mask2former-swin-small-coco-instance" in row.note for row in rows.values())
    assert set(rows) == {*TAGS, "mean"}


def test_a_detector_and_a_clip_judge_every_image_once(images, tmp_path, capfd):
    detector = tiny_judges.save_mask2former(tmp_path / "detector", sharpness=40)
    clip = tiny_judges.save_clip(tmp_path / "clip")
    (images / FILES[0][0]).unlink()
    (images / FILES[0][1]).write_bytes(b"no image")
    options = (f"detector={detector}", f"clip={clip}")
    first = scored(images, *options)
    assert first["single_object"].n == 2 and first["single_object"].skipped == 2 and first["mean"].n == 22
    assert "missing image (1" in first["mean"].note and "unreadable image: not an image (1" in first["mean"].note
    assert "transformers Mask2Former" in first["mean"].protocol["judge"] and "CLIP" in first["mean"].protocol["judge"]
    records = (images.with_name("images.detections.jsonl")).read_text().splitlines()
    assert len(records) == 23 and "find objects 24/24" in capfd.readouterr().err
    again = scored(images, *options)
    assert {n: r.value for n, r in again.items()} == {n: r.value for n, r in first.items()}
    assert (images.with_name("images.detections.jsonl")).read_text().splitlines() == records
    assert "find objects" not in capfd.readouterr().err, "nothing was left to do"


def test_drawn_folders_are_scored_as_they_are(um3_folder, tmp_path):
    from eval.benchmarks.generate_images import main as draw

    tiny_judges.write_lines(tmp_path / "metadata.jsonl", PROMPTS)
    out = tmp_path / "out"
    draw(
        [
            f"model={um3_folder}",
            f"prompts={tmp_path / 'metadata.jsonl'}",
            f"output_dir={out}",
            "layout=geneval",
            "num_images=4",
        ]
    )
    rows = scored(out, f"detections={detections(tmp_path / 'd.jsonl')}")
    assert rows["mean"].value == 1 and rows["mean"].protocol["temperature"] == 1.0
    pins = json.loads(out.with_name("out.json").read_text())["pins"]
    assert pins["model_sha256"] and pins["seeds_sha256"] and pins["detections_sha256"] and rows["mean"].seed == 0
    shutil.rmtree(out / "00002")
    rows = scored(out, f"detections={detections(tmp_path / 'd.jsonl')}")
    assert rows["counting"].value is None and rows["mean"].value is None


def test_mistakes_are_one_line(images, tmp_path):
    with pytest.raises(UserError, match="set images=FOLDER"):
        main([])
    with pytest.raises(UserError, match="objects come from one of them"):
        main([f"images={images}", "detector=a", "detections=b"])
    with pytest.raises(UserError, match="holds no prompt of GenEval"):
        main([f"images={tmp_path}"])
    hub = scored(images, "detector=nobody/nothing")
    assert hub["mean"].value is None and "no Mask2Former at 'nobody/nothing'" in hub["mean"].note
    with pytest.raises(UserError, match="no weights"):
        main([f"images={images}", f"detector={tmp_path}"])
