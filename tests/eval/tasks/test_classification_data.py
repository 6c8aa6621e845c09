"""Classification data from folders, tables and shards: classes, names, templates, unreadable images, rows."""

import io
import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.config import ClassificationConfig
from eval.tasks.classification_data import open_classification, read_class_names, read_templates
from tests.helpers.image_files import write_tar
from um3.core.errors import UserError

SMALL = ("parts=[tokenizer]", "tokenizer.num_images=4", "tokenizer.digits=false")
COLOURS = {"n01_red": (215, 30, 35), "n02_blue": (35, 80, 220)}


def encoded(colour, number):
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 3)):
        for name, colour in COLOURS.items():
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.png").write_bytes(encoded(colour, number))
    (tmp_path / "data/val/n01_red/broken.jpg").write_bytes(b"no image")
    (tmp_path / "data/val/.hidden").mkdir()
    return tmp_path / "data"


def test_a_folder_gives_its_images_with_their_classes(folder):
    task = open_classification(ClassificationConfig(path=str(folder)), size=32)
    assert task.class_names == ["n01 red", "n02 blue"] and task.train is not None and len(task.train) == 8
    for _ in range(2):  # every pass is the same
        ((images, labels),) = task.val.batches()
        assert images.shape == (6, 32, 32, 3) and list(labels) == [0, 0, 0, 1, 1, 1] and task.val.skipped == 1
        assert [tuple(image[16, 16]) for image in images[2:4]] == list(COLOURS.values())


def test_names_and_templates(tmp_path):
    file = tmp_path / "lines.txt"
    assert read_class_names("", classes=["a_b", "c"]) == ["a b", "c"]
    assert read_templates("") == ["a photo of a {}."]
    file.write_text("tench\n\n great white shark \n", encoding="utf-8")
    assert read_class_names(str(file), classes=["n1", "n2"]) == ["tench", "great white shark"]
    with pytest.raises(UserError, match="2 class names for 3 classes"):
        read_class_names(str(file), classes=["n1", "n2", "n3"])
    with pytest.raises(UserError, match=r"none.txt cannot be read"):
        read_class_names(str(tmp_path / "none.txt"), classes=["a"])
    broken = {"a photo} of a {}.": "exactly one", "a {}.\na bad photo": "'a bad photo'", "": "no templ"}
    for text, message in broken.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_templates(str(file))


def test_folders_that_cannot_be_classified_are_named(folder):
    def refused(message, path=folder):
        with pytest.raises(UserError, match=message):
            list(open_classification(ClassificationConfig(path=str(path)), size=32).val.batches())

    refused("nowhere/val does not exist", folder / "nowhere")
    (folder / "val/n03").mkdir()
    refused(r"val/n03 has no image")
    (folder / "val/n03/0.png").write_bytes(encoded((0, 0, 0), 0))
    refused(r"'n03'.* train and val")
    for name in ("train/n02_blue", "val/n02_blue", "val/n03"):
        shutil.rmtree(folder / name)
    refused("1 classes")
    shutil.move(folder / "train", folder / "renamed")
    shutil.copytree(folder / "val/n01_red", folder / "val/n02")
    for file in folder.glob("val/*/*.*"):
        file.write_bytes(b"no image")
    refused("none of its 8 images")


def test_an_evaluation_measures_them(folder, evaluate, tmp_path):
    (tmp_path / "names.txt").write_text("red circle\nblue circle\n", encoding="utf-8")
    settings = f"tokenizer.classification=[{{name: colours, path: {folder}, class_names: {tmp_path}/names.txt}}]"
    rows = evaluate(*SMALL, settings, folder="both")
    zero_shot = rows["colours_classification/zero_shot"]
    assert (zero_shot.n, zero_shot.skipped, zero_shot.protocol["classes"]) == (6, 1, ["red circle", "blue circle"])
    assert zero_shot.value is not None and zero_shot.value in np.arange(7) / 6
    assert rows["colours_classification/probe_mean"].value == 1.0
    shutil.rmtree(folder / "train")
    row = evaluate(*SMALL, settings, folder="val")["colours_classification/probe_cls"]
    assert row.value is None and f"{folder}/train" in row.note


def write_parquet(root):
    for split in ("train", "val"):
        rows = [(encoded(colour, n), label) for label, colour in enumerate(COLOURS.values()) for n in range(4)]
        rows.append((b"no image", 0))
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        pq.write_table(pa.table(columns), root / f"{split}-00000.parquet")
    return "label"


def write_shards(root):
    for split in ("train", "val"):
        members = {}
        for label, number in itertools.product(range(2), range(30)):
            stem, image = f"{split}{label}{number:02d}", encoded([*COLOURS.values()][label], number)
            members |= {f"{stem}.png": image, f"{stem}.cls": str(label).encode()}
        write_tar(root / f"{split}-00000.tar", members)
    return "cls"


@pytest.mark.parametrize("write", [write_parquet, write_shards])
def test_tables_and_shards_have_classes_too(write, tmp_path, evaluate):
    data, names = tmp_path / "data", tmp_path / "names.txt"
    data.mkdir()
    names.write_text("red\nblue\n")
    table = f"{{name: colours, path: {data}, label_column: {write(data)}, class_names: {names}}}"
    rows = evaluate(*SMALL, f"tokenizer.classification=[{table}]", "tokenizer.probe.kind=logistic")
    zero_shot = rows["colours_classification/zero_shot"]
    assert zero_shot.protocol["classes"] == ["red", "blue"] and zero_shot.value is not None
    assert (zero_shot.n, zero_shot.skipped) == ((8, 1) if write is write_parquet else (zero_shot.n, 0))
    assert rows["colours_classification/probe_cls_mean"].value == 1.0
    with pytest.raises(UserError):
        evaluate(*SMALL, f"tokenizer.classification=[{table.replace('label_column: ', 'label_column: no_')}]")
