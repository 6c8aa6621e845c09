"""The tokenizer part: LPIPS, protocols, what makes a result out of date, errors before the first measurement."""

import functools
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_mix.sources.image_sources import ImageSourceConfig
from eval.config import EvalConfig
from eval.run import request_hash
from eval.tasks.validation_data import validation_images
from tests.tokenizer.conftest import lpips_files
from tokenizer.losses import lpips_vgg
from tokenizer.modeling import QLIPModel
from um3.core.config import load_config
from um3.core.errors import UserError

SMALL = ["parts=[tokenizer]", "tokenizer.num_images=6", "tokenizer.digits=false"]
SCENES = "images=[{name: scenes, kind: scenes, length: 2400}]"


def make_lpips(folder, *, seed):
    """LPIPS's two files as settings."""
    backbone, heads = lpips_files(folder, seed=seed)
    return [f"tokenizer.perceptual.backbone={backbone}", f"tokenizer.perceptual.heads={heads}"]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    return make_lpips(tmp_path_factory.mktemp("lpips"), seed=0)


@pytest.fixture
def measure(run_folder, evaluate):
    """Evaluates stage 2 of the tiny run with further settings; returns the rows by key."""
    stages = f"tokenizer.stages={{stage2: {run_folder}/stage2/model}}"
    return functools.partial(evaluate, stages, SCENES, *SMALL)


@pytest.mark.slow
def test_lpips_is_the_mean_of_its_distance(measure, tmp_path, lpips):
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


@pytest.mark.slow
def test_a_protocol_changes_with_images_networks_and_weights(measure, tmp_path, lpips):
    def hashes(*settings):
        rows = measure(*lpips, *settings).values()
        return {row.metric: row.protocol_hash for row in rows if row.task == "scenes_reconstruction_stage2"}

    distance = "frechet_distance[random-features]"
    metrics, first = {"psnr", "ssim", "lpips", distance}, hashes()
    assert metrics | {"bits_per_image"} <= first.keys() and hashes("force=true") == first
    for settings, expected in (
        (["tokenizer.num_images=7"], metrics),
        ([SCENES.replace("2400", "2000")], metrics),
        (["fid_features=qlip-features"], {distance}),
        (make_lpips(tmp_path, seed=1), {"lpips"}),
    ):
        second = hashes(*settings)
        assert {metric for metric in metrics if second.get(metric) != first[metric]} == expected


def test_the_protocol_of_photos_names_their_preparation(tmp_path):
    def protocol(**changes):
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


def test_every_image_is_encoded_once(measure, monkeypatch):
    counts, encode = [], QLIPModel.encode
    monkeypatch.setattr(QLIPModel, "encode", lambda self, pixels: counts.append(len(pixels)) or encode(self, pixels))
    assert measure()["scenes_bits/entropy"].n == 6 and counts == [1, 6]  # one is tried when the model is loaded


@pytest.fixture
def classes(tmp_path):
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


def test_changed_files_make_a_result_out_of_date(classes, monkeypatch):
    monkeypatch.syspath_prepend(classes)
    files = f"path: {classes}/data, class_names: {classes}/names.txt, templates: {classes}/templates.txt"
    overrides = [f"tokenizer.classification=[{{name: own, {files}}}]", "tokenizer.external={mine: 'own_codec:make'}"]
    overrides.append(f"tokenizer.perceptual={{backbone: {classes}/vgg.pth, heads: ''}}")
    config = load_config(EvalConfig, overrides=overrides)

    def request():
        return request_hash(config, part="tokenizer", models={"qlip": classes / "model"})

    def move(old, new):
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
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    assert request() == seen[-1], "times do not count"
    (classes / "templates.txt").unlink()
    seen.append(request())
    assert seen[3] != seen[0] and len({*seen}) == len(seen) - 1, "each differs, except after the image is moved back"
    assert seen[5] == seen[2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokenizer.classification=[{name: own, path: nowhere}]", "nowhere/val does not exist"),
        ("tokenizer.classification=[{name: own, path: DATA/data}, {name: own, path: DATA/data}]", "unique name"),
        ("tokenizer.classification=[{name: own, path: DATA/data, templates: DATA/names.txt}]", "exactly one {}"),
        ("tokenizer.external={mine: 'mean_colour:nothing'}", "image_size is None"),
        ("tokenizer.perceptual={backbone: DATA/vgg.pth, heads: DATA/vgg.pth}", "cannot be read as tensors only"),
        ("tokenizer.perceptual={backbone: DATA/vgg.pth}", "needs both"),
        ("tokenizer.stages={a: RUN/stage1/model, b: DATA/broken}", "is damaged"),
    ],
)
def test_errors_come_before_the_first_measurement(measure, run_folder, classes, setting, message, capsys):
    shutil.copytree(run_folder / "stage1/model", classes / "broken")
    (classes / "broken/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=message):
        measure(setting.replace("DATA", str(classes)).replace("RUN", str(run_folder)))
    assert "encode" not in capsys.readouterr().err
