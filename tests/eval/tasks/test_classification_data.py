"""Images sorted into folders: classes, names, templates, what cannot be read, and the rows they give."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.run import main
from eval.scores import read_scores
from eval.tasks.classification_data import LabelledFolder, read_class_names, read_templates
from tests.data_mix.sources.test_sources import write_tar
from um3.core.errors import UserError

COLOURS = {"n01_red": (215, 30, 35), "n02_blue": (35, 80, 220)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 3)):
        for name, colour in COLOURS.items():
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30), colour).save(place / f"{number}.png")
    (tmp_path / "data/val/n01_red/broken.jpg").write_bytes(b"no image")
    (tmp_path / "data/val/.hidden").mkdir()
    return tmp_path / "data"


def test_a_folder_gives_its_images_with_their_classes(folder: Path) -> None:
    data = LabelledFolder(folder / "val", size=32)
    assert data.classes == list(COLOURS)
    for _ in range(2):  # every pass is the same
        ((images, labels),) = data.batches()
        assert images.shape == (6, 32, 32, 3) and list(labels) == [0, 0, 0, 1, 1, 1] and data.skipped == 1
        assert [tuple(image[16, 16]) for image in images[2:4]] == list(COLOURS.values())


def test_names_and_templates(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    assert read_class_names("", classes=["a_b", "c"]) == ["a b", "c"]
    assert read_templates("") == ["a photo of a {}."]
    file.write_text("tench\n\n great white shark \n", encoding="utf-8")
    assert read_class_names(str(file), classes=["n1", "n2"]) == ["tench", "great white shark"]
    with pytest.raises(UserError, match="names 2 classes, but there are 3;"):
        read_class_names(str(file), classes=["n1", "n2", "n3"])
    file.write_text("a photo} of a {}.\n", encoding="utf-8")
    with pytest.raises(UserError, match="needs exactly one"):
        read_templates(str(file))
    file.write_text("a photo of a {}.\na bad photo\n", encoding="utf-8")
    with pytest.raises(UserError, match="'a bad photo' needs exactly one"):
        read_templates(str(file))
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no templates"):
        read_templates(str(file))
    with pytest.raises(UserError, match="cannot read the class names in"):
        read_class_names(str(tmp_path / "none.txt"), classes=["a"])


def test_two_of_one_name_are_refused(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text("tokenizer: {classification: [{name: digits, path: data}]}\n")
    with pytest.raises(UserError, match="a name of its own"):
        main(["--config", str(tmp_path / "eval.yaml"), f"run={run_folder}"])


def test_folders_that_cannot_be_classified_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        LabelledFolder(folder / "nowhere", size=32)
    with pytest.raises(UserError, match="holds 0 folders"):
        LabelledFolder(folder / "val/n01_red", size=32)
    (folder / "val/n03").mkdir()
    with pytest.raises(UserError, match="n03: no image in it"):
        LabelledFolder(folder / "val", size=32)
    (folder / "val/n03").rmdir()
    for file in folder.glob("val/*/*.*"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of its 7 images can be read"):
        list(LabelledFolder(folder / "val", size=32).batches())


def test_an_evaluation_measures_them(folder: Path, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red circle\nblue circle\n", encoding="utf-8")
    own = f"{{name: colours, path: {folder}, class_names: {tmp_path}/names.txt}}"
    (tmp_path / "eval.yaml").write_text(
        f"parts: [tokenizer]\ntokenizer: {{num_images: 4, labelled: false, classification: [{own}]}}\nnum_threads: 1\n"
    )
    command = ["--config", str(tmp_path / "eval.yaml"), f"run={run_folder}"]
    main([*command, f"out={tmp_path}/out"])
    rows = {row.key: row for row in read_scores(tmp_path / "out/tokenizer.json")}
    zero_shot = rows["colours_classification/zero_shot"]
    assert (zero_shot.n, zero_shot.skipped, zero_shot.protocol["classes"]) == (6, 1, ["red circle", "blue circle"])
    assert zero_shot.value is not None and zero_shot.value in np.arange(7) / 6
    assert rows["colours_classification/probe_mean"].value == 1.0 and "digits_classification/zero_shot" not in rows
    (folder / "train/n02_blue").rename(folder / "train/n04")
    with pytest.raises(UserError, match="'n02_blue' is in one only"):
        main([*command, f"out={tmp_path}/other"])
    for name in ("n01_red", "n04"):
        for file in (folder / "train" / name).iterdir():
            file.unlink()
        (folder / "train" / name).rmdir()
    (folder / "train").rmdir()
    main([*command, f"out={tmp_path}/third"])
    rows = {row.key: row for row in read_scores(tmp_path / "third/tokenizer.json")}
    assert "needs" in rows["colours_classification/probe_cls"].note


def encoded(colour: tuple[int, int, int], number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(root: Path) -> str:
    for split in ("train", "val"):
        rows = [(encoded(colour, n), label) for label, colour in enumerate(COLOURS.values()) for n in range(4)]
        rows.append((b"no image", 0))
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        pq.write_table(pa.table(columns), root / f"{split}-00000.parquet")
    return "label"


def write_shards(root: Path) -> str:
    for split in ("train", "val"):
        members: dict[str, bytes] = {}
        for label, colour in enumerate(COLOURS.values()):
            for number in range(30):
                stem = f"{split}{label}{number:02d}"
                members |= {f"{stem}.png": encoded(colour, number), f"{stem}.cls": str(label).encode()}
        write_tar(root / f"{split}-00000.tar", members)
    return "cls"


@pytest.mark.parametrize("write", [write_parquet, write_shards])
def test_tables_and_shards_give_their_classes_too(
    write: Callable[[Path], str], tmp_path: Path, run_folder: Path
) -> None:
    data, names, out = tmp_path / "data", tmp_path / "names.txt", tmp_path / "out"
    data.mkdir()
    names.write_text("red\nblue\n")
    own = f"{{name: colours, path: {data}, label_column: {write(data)}, class_names: {names}}}"
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"tokenizer: {{num_images: 4, labelled: false, classification: [{own}], probe: {{kind: logistic}}}}"
    )
    command = ["--config", str(config), f"run={run_folder}", f"output_dir={out}", "parts=[tokenizer]"]
    main(command)
    scores = {score.key: score for score in read_scores(out / "tokenizer.json")}
    zero_shot = scores["colours_classification/zero_shot"]
    assert zero_shot.protocol["classes"] == ["red", "blue"] and zero_shot.value is not None
    assert (zero_shot.n, zero_shot.skipped) == ((8, 1) if write is write_parquet else (zero_shot.n, 0))
    assert scores["colours_classification/probe_cls_mean"].value == 1.0
    before = (out / "tokenizer.json").stat().st_mtime_ns
    main(command)
    assert (out / "tokenizer.json").stat().st_mtime_ns == before
    os.utime(next(iter(data.iterdir())), ns=(1, 1))
    main(command)
    assert (out / "tokenizer.json").stat().st_mtime_ns != before
    config.write_text(config.read_text().replace("label_column: ", "label_column: no_"))
    with pytest.raises(UserError):
        main(command)
