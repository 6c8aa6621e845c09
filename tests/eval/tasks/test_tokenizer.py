"""The tokenizer part: LPIPS, protocols, what makes a result out of date, errors before the first measurement."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_mix.sources.image_sources import ImageSourceConfig
from eval.config import EvalConfig
from eval.run import request_hash
from eval.scores import Score
from eval.tasks.validation_data import validation_images
from tests.tokenizer.conftest import lpips_files
from tokenizer.modeling import QLIPModel
from tokenizer.perceptual import lpips_vgg
from um3.core.config import load_config
from um3.core.errors import UserError

SMALL = ["parts=[tokenizer]", "tokenizer.num_images=6", "tokenizer.digits=false"]
SCENES = "images=[{name: scenes, kind: scenes, length: 2400}]"


def make_lpips(folder: Path, *, seed: int) -> list[str]:
    """LPIPS's two files as settings."""
    backbone, heads = lpips_files(folder, seed=seed)
    return [f"tokenizer.perceptual.backbone={backbone}", f"tokenizer.perceptual.heads={heads}"]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_lpips(tmp_path_factory.mktemp("lpips"), seed=0)


Measure = Callable[..., dict[str, Score]]


@pytest.fixture
def measure(run_folder: Path, evaluate: Measure) -> Measure:
    """Evaluates stage 2 of the tiny run with further settings; returns the rows by key."""
    stages = f"tokenizer.stages={{stage2: {run_folder}/stage2/model}}"
    return functools.partial(evaluate, stages, SCENES, *SMALL)


@pytest.mark.slow
def test_lpips_is_the_mean_of_its_distance(measure: Measure, tmp_path: Path, lpips: list[str]) -> None:
    row = measure("tokenizer.num_images=19", *lpips)["scenes_reconstruction_stage2/lpips"]
    backbone, heads = (setting.partition("=")[2] for setting in lpips)
    distance = lpips_vgg(backbone=backbone, heads=heads)
    with np.load(tmp_path / "eval" / "tokenizer.npz") as arrays:
        first, second = (
            torch.tensor(arrays[f"scenes_{kind}"]).permute(0, 3, 1, 2) / 127.5 - 1 for kind in ("stage2", "original")
        )
    expected = np.mean([float(distance(a[None], b[None])) for a, b in zip(first, second, strict=True)])
    assert row.value == pytest.approx(expected, rel=1e-5) and row.value > 0 and row.n == 19
    assert not row.higher_is_better and row.protocol["network"] == "lpips_vgg"


def hashes(rows: dict[str, Score], *, task: str) -> dict[str, str]:
    return {row.metric: row.protocol_hash for row in rows.values() if row.task == task}


@pytest.mark.slow
def test_a_protocol_changes_with_images_networks_and_weights(
    measure: Measure, tmp_path: Path, lpips: list[str]
) -> None:
    task, distance = "scenes_reconstruction_stage2", "frechet_distance[random-features]"
    first = hashes(measure(*lpips), task=task)
    assert {"psnr", "ssim", "lpips", "bits_per_image", distance} <= first.keys()
    assert hashes(measure(*lpips, "force=true"), task=task) == first
    other_lpips = make_lpips(tmp_path, seed=1)
    changes = {
        "tokenizer.num_images=7": {"psnr", "ssim", "lpips", distance},
        SCENES.replace("2400", "2000"): {"psnr", "ssim", "lpips", distance},
        "fid_features=qlip-features": {distance},
        " ".join(other_lpips): {"lpips"},
    }
    for settings, expected in changes.items():
        overrides = [settings] if settings.startswith("images") else settings.split()
        second = hashes(measure(*lpips, *overrides), task=task)
        metrics = ("psnr", "ssim", "lpips", distance)
        assert {metric for metric in metrics if second.get(metric) != first[metric]} == expected


def test_a_protocol_identifies_images_by_their_pixels() -> None:
    def protocol(*, num_images: int = 6, size: int = 32, seed: int = 0, length: int = 120) -> dict[str, Any]:
        source = ImageSourceConfig(length=length)
        return validation_images(source, num_images=num_images, size=size, seed=seed).protocol

    first = protocol()
    assert first == protocol() and first["images"] == 6 and first["image_size"] == 32
    for other in (protocol(num_images=5), protocol(size=48), protocol(seed=1)):
        assert other["images_sha256"] != first["images_sha256"]


def test_the_protocol_of_photos_names_their_preparation(tmp_path: Path) -> None:
    def protocol(**changes: int) -> dict[str, Any]:
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            pixels[10, 15] = changes.get("grey", 0)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"number {number}")
        source = ImageSourceConfig(name="photos", path=str(tmp_path), val_fraction=0.5)
        return validation_images(source, num_images=40, size=32, seed=changes.get("seed", 0)).protocol

    first = protocol()
    assert "largest centred square" in first["preparation"] and "bicubic" in first["preparation"]
    assert protocol(seed=1) == first, "the same images in another order"
    assert protocol(grey=9)["images_sha256"] != first["images_sha256"]


def test_every_image_is_encoded_once(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, encode = [], QLIPModel.encode
    monkeypatch.setattr(QLIPModel, "encode", lambda self, pixels: counts.append(len(pixels)) or encode(self, pixels))
    assert measure()["scenes_bits/entropy"].n == 6 and counts == [1, 6]  # one is tried when the model is loaded


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name, colour in (("red", (215, 30, 35)), ("blue", (35, 80, 220))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 30), colour).save(tmp_path / "data" / split / name / f"{number}.png")
    (tmp_path / "names.txt").write_text("blue\nred\n")
    (tmp_path / "templates.txt").write_text("a {}\n")
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    (tmp_path / "own_codec.py").write_text("def make():\n    return None\n")
    return tmp_path


def settings_of(folder: Path) -> list[str]:
    files = f"path: {folder}/data, class_names: {folder}/names.txt, templates: {folder}/templates.txt"
    return [f"tokenizer.classification=[{{name: own, {files}}}]", "tokenizer.external={mine: 'own_codec:make'}"]


def test_changed_files_make_a_result_out_of_date(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(classes)
    perceptual = f"tokenizer.perceptual={{backbone: {classes}/vgg.pth, heads: ''}}"
    config = load_config(EvalConfig, overrides=[*settings_of(classes), perceptual])

    def request() -> str:
        return request_hash(config, part="tokenizer", models={"qlip": classes / "model"})

    def later(file: Path) -> None:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))

    def move(old: str, new: str) -> Callable[[], object]:
        return lambda: (classes / old).rename(classes / new)

    (classes / "model").mkdir()
    (classes / "model" / "tokenizer.json").write_text("{}")
    seen = [request()]
    assert request() == seen[0]
    for change in (
        lambda: (classes / "names.txt").write_text("navy\nred\n"),
        lambda: (classes / "templates.txt").write_text("the {}\n"),
        lambda: shutil.copy(classes / "data/val/red/0.png", classes / "data/val/red/2.png"),
        move("data/val/red/2.png", "data/val/blue/2.png"),
        lambda: (classes / "data/val/blue/2.png").unlink(),
        lambda: (classes / "data/train/red/1.png").write_bytes(b"other"),
        move("data/train/red", "data/train/scarlet"),
        lambda: (classes / "vgg.pth").write_bytes(b"Weights"),
        lambda: (classes / "own_codec.py").write_text("def make():\n    return 3\n"),
        lambda: (classes / "model" / "tokenizer.json").write_text('{"model": {}}'),
    ):
        change()
        seen.append(request())
    for file in classes.rglob("*.*"):
        later(file)
    assert request() == seen[-1], "times do not count"
    (classes / "templates.txt").unlink()
    seen.append(request())
    assert seen[3] != seen[0] and len({*seen}) == len(seen) - 1, "each differs, except after the image is moved back"
    assert seen[5] == seen[2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokenizer.classification=[{name: own, path: nowhere}]", "nowhere/val does not exist"),
        ("tokenizer.classification=[{name: own, path: DATA/data, class_names: DATA/templates.txt}]", "1 class names"),
        ("tokenizer.classification=[{name: own, path: DATA/data, templates: DATA/names.txt}]", "exactly one {}"),
        ("tokenizer.external={mine: 'mean_colour:nothing'}", "image_size is None"),
        ("tokenizer.perceptual={backbone: DATA/vgg.pth, heads: DATA/vgg.pth}", "cannot be read as tensors only"),
        ("tokenizer.perceptual={backbone: DATA/vgg.pth}", "needs both"),
        ("tokenizer.stages={a: RUN/stage1/model, b: DATA/broken}", "is damaged"),
    ],
)
def test_errors_come_before_the_first_measurement(
    measure: Measure, run_folder: Path, classes: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder / "stage1/model", classes / "broken")
    (classes / "broken/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=message) as caught:
        measure(setting.replace("DATA", str(classes)).replace("RUN", str(run_folder)))
    assert "encode" not in capsys.readouterr().err and "\n" not in str(caught.value)
