"""Scoring folders of generated images: distances by hand, resuming, skipped images, and rows without a value."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks import feature_statistics
from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.benchmarks.coco_generation import main
from eval.metrics.clipscore import clip_cosines, load_clip
from eval.metrics.features import inception_features, random_features
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception import PREPROCESSINGS
from eval.scores import read_scores
from tests.helpers import tiny_judges
from tests.helpers.processes import locked
from um3.core.errors import UserError
from um3.inference.image_io import save_png

RANDOM = "frechet_distance[random-features]"


def noise(*, count, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256 - 100 * seed, (count, side, side, 3)).astype(np.uint8)


def folder(path, images):
    for index, image in enumerate(images):
        save_png(image, path / f"{index:02d}.png")
    return path


@pytest.fixture
def generated(tmp_path):
    return folder(tmp_path / "generated", noise(count=12, seed=0))


@pytest.fixture
def real(tmp_path):
    return folder(tmp_path / "real", noise(count=9, seed=1))


def scored(images, *options):
    main([f"images={images}", *options])
    return {row.metric: row for row in read_scores(f"{images}.json")}


def result(images, key):
    return json.loads(images.with_name(f"{images.name}.json").read_text())[key]


def test_the_distance_is_that_of_the_features(generated, real):
    rows = scored(generated, f"reference={real}")
    network = random_features()
    expected = frechet_distance(network.moments(noise(count=12, seed=0)), network.moments(noise(count=9, seed=1)))
    assert rows[RANDOM].value == pytest.approx(expected, rel=1e-5) and rows[RANDOM].n == 12
    protocol = rows[RANDOM].protocol
    assert (protocol["generated_images"], protocol["reference_images"]) == (12, 9)
    assert protocol["preparation"] == "largest centred square, Pillow's lanczos to 32, uint8"
    for name in ("fid", "fid_clean"):
        assert rows[name].value is None and "pt_inception-2015-12-05-6726825d.pth" in rows[name].note
    assert "clip-vit-base-patch32" in rows["clipscore"].note
    rows = scored(generated)
    assert set(rows) == {"fid", "fid_clean", "clipscore"} and "set reference=" in rows["fid"].note


def test_equal_sets_have_distance_zero_in_any_order(generated, tmp_path):
    row = scored(generated, f"reference={folder(tmp_path / 'mixed', noise(count=12, seed=0)[::-1])}")[RANDOM]
    assert row.value == pytest.approx(0, abs=1e-6)
    assert result(generated, "pins")["images_sha256"] == row.protocol["reference_sha256"]


def distance_of_pairs(first_2D, second_2D):
    """The Frechet distance of two sets of two vectors, in closed form: their covariances have rank one."""
    a, b = ((pair[0] - pair[1]).double() / 2**0.5 for pair in (first_2D, second_2D))
    offset = first_2D.double().mean(0) - second_2D.double().mean(0)
    return float(offset @ offset + a @ a + b @ b - 2 * (a @ b).abs())


@pytest.mark.slow
def test_fid_by_hand_against_statistics_of_pytorch_fid(inception, tmp_path):
    weights, sha256 = inception
    network = inception_features(weights, sha256=sha256)
    first, second = noise(count=2, seed=0), noise(count=2, seed=1)
    features = network.extract(second).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    generated = folder(tmp_path / "generated", first)
    options = [f"reference={tmp_path / 'stats.npz'}", f"inception_weights={weights}"]
    rows = scored(generated, *options, f"inception_sha256={sha256}")
    expected = distance_of_pairs(network.extract(first), network.extract(second))
    assert rows["fid"].value == pytest.approx(expected, rel=1e-4) and rows["fid"].paper == 44.1
    assert rows["fid"].protocol["features"] == "inception-2015 pytorch-fid"
    assert "2 images for 2048 dimensions" in rows["fid"].note
    assert rows["fid_clean"].value is None and "no statistics of inception-2015 clean-fid" in rows["fid_clean"].note
    with pytest.raises(UserError, match="is not the published file"):
        scored(generated, *options)


@pytest.mark.slow
def test_a_folder_is_measured_once_for_every_preprocessing(inception, generated):
    weights, sha256 = inception
    networks = [inception_features(weights, sha256=sha256, preprocessing=name) for name in PREPROCESSINGS]
    statistics = feature_statistics.measure_features(
        Benchmark.of_images("test", ScoredImagesConfig(str(generated))),
        {file.name: file for file in sorted(generated.iterdir())[:2]},
        networks=networks,
        preparation=("unchanged", np.asarray),
        label="measure",
        skipped=None,
    )
    assert list(statistics.moments) == [f"inception-2015 {name}" for name in PREPROCESSINGS]
    for network, moments in zip(networks, statistics.moments.values(), strict=True):
        expected = network.moments(noise(count=12, seed=0)[:2])
        torch.testing.assert_close(moments.mean, expected.mean)
        torch.testing.assert_close(moments.covariance, expected.covariance)
    means = [moments.mean for moments in statistics.moments.values()]
    assert not torch.allclose(means[0], means[1], rtol=1e-3) and not torch.allclose(means[0], means[2], rtol=1e-3)


def test_unusable_images_are_skipped_by_name_and_number(generated, real):
    (generated / "03.png").write_bytes(b"no image")
    save_png(noise(count=1, seed=0, side=16)[0], generated / "00.png")
    row = scored(generated, f"reference={real}")[RANDOM]
    assert (row.n, row.skipped) == (10, 2)
    assert "unreadable image: not an image (1, such as 03.png)" in row.note
    assert "image of another size (1, such as 00.png)" in row.note
    assert result(generated, "skipped")["image of another size"] == {"count": 1, "first": ["00.png"]}


def test_real_images_of_any_shape_are_cropped_and_resized(generated, tmp_path):
    wide = np.random.default_rng(3).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    shifted = [np.roll(wide, index, axis=0) for index in range(3)]
    folder(tmp_path / "real", shifted)
    squares = [Image.fromarray(image[:, 16:80]).resize((32, 32), Image.Resampling.LANCZOS) for image in shifted]
    network = random_features()
    moments = network.moments(np.stack([np.asarray(square) for square in squares]))
    expected = frechet_distance(network.moments(noise(count=12, seed=0)), moments)
    lanczos, bicubic = (
        scored(generated, f"reference={tmp_path / 'real'}", *options)[RANDOM].value
        for options in ([], ["resize=bicubic"])
    )
    assert lanczos == pytest.approx(expected, rel=1e-5) and bicubic != pytest.approx(expected, rel=1e-5)


def test_statistics_of_a_reference_replace_its_folder(generated, real):
    first = scored(generated, f"reference={real}")[RANDOM]
    statistics = generated.with_name("generated.reference.npz")
    shutil.rmtree(real)
    again = scored(generated, f"reference={statistics}")[RANDOM]
    assert again.value == first.value and again.protocol == first.protocol
    with pytest.raises(UserError, match=r"was made differently \(preparation: .*lanczos to 32.* -> .*bicubic to 32"):
        scored(generated, f"reference={statistics}", "resize=bicubic")


def test_statistics_of_another_network_give_a_row_without_a_value(generated, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    rows = scored(generated, f"reference={tmp_path / 'stats.npz'}")
    assert rows[RANDOM].value is None and "no statistics of random-features" in rows[RANDOM].note


BAD_STATISTICS = {
    "other names": {"mean": np.zeros(3)},
    "mu alone": {"mu": np.zeros(2048)},
    "another size": {"mu": np.zeros(2048), "sigma": np.eye(2047)},
    "a row": {"mu": np.zeros((1, 2048)), "sigma": np.eye(2048)},
    "text": {"mu": np.full(2, "x"), "sigma": np.full((2, 2), "x")},
    "complex": {"mu": np.zeros(2, complex), "sigma": np.eye(2)},
    "not finite": {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
    "pickled": {"mu": np.array([{}, {}]), "sigma": np.eye(2)},
    "about is a list": {"about": np.asarray("[1]")},
    "about is nested": {"about": np.asarray("[" * 100_000)},
}


@pytest.mark.parametrize("content", BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_bad_statistics_are_refused_in_one_line(content, tmp_path):
    np.savez(tmp_path / "bad.npz", **content)
    refuse_statistics(tmp_path / "bad.npz")


def test_damaged_own_statistics_are_refused_in_one_line(generated, real):
    scored(generated, f"reference={real}")
    path = generated.with_name("generated.reference.npz")
    arrays, whole = dict(np.load(path)), path.read_bytes()
    for data in (b"", b"no npz", whole[:-200]):
        path.write_bytes(data)
        refuse_statistics(path)
    np.savez(path, **arrays | {"random-features/mu": np.zeros(5)})
    refuse_statistics(path)


def refuse_statistics(path):
    preparation = ("largest centred square, Pillow's lanczos to 32, uint8", np.asarray)
    with pytest.raises(UserError, match="no feature statistics") as caught:
        feature_statistics.load_statistics(path, networks=[random_features()], preparation=preparation)
    assert str(path) in str(caught.value)


def test_one_process_writes_a_result_file(generated):
    with locked(generated.with_name("generated.cache")), pytest.raises(UserError, match="another process is writing"):
        scored(generated)
    scored(generated)


def test_a_killed_measurement_resumes_to_the_same_bits(generated, real, monkeypatch):
    monkeypatch.setattr(feature_statistics, "BATCH", 5)
    whole = scored(generated, f"reference={real}")[RANDOM]
    cache = generated.with_name("generated.cache.jsonl")
    lines = cache.read_text().splitlines()[1:]
    assert [json.loads(line)["item"][:6] for line in lines[:12]] == [f"{index:02d}.png" for index in range(12)]
    cache.write_text("\n".join(lines[:7]) + lines[8][:20])
    assert scored(generated, f"reference={real}")[RANDOM] == whole


def test_clipscore_by_three_conventions(um3_folder, tmp_path):
    from eval.tasks.generate_images import main as generate

    prompts = ["a photo of a dog", "a red cat", "a blue dog", "yes or no"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    images = tmp_path / "images"
    generate([f"model={um3_folder}", f"prompts={tmp_path / 'prompts.txt'}", f"output_dir={images}"])
    clip = tiny_judges.save_clip(tmp_path / "clip")
    pixels = np.stack([np.asarray(Image.open(images / f"{index:05d}.png")) for index in range(4)])
    cosines = clip_cosines(pixels, texts=prompts, clip=load_clip(str(clip)))
    rows = scored(images, f"clip={clip}")
    assert rows["clipscore"].value == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert rows["clipscore"].low <= rows["clipscore"].value <= rows["clipscore"].high
    assert rows["clipscore_100"].value == pytest.approx(100 * max(float(cosines.mean()), 0), abs=1e-4)
    assert rows["clipscore_2.5"].value == pytest.approx(float(2.5 * cosines.clamp(min=0).mean()), abs=1e-5)
    prefixed = scored(images, f"clip={clip}", "clip_prefix='A photo depicts '")["clipscore"]
    assert prefixed.value != rows["clipscore"].value and prefixed.protocol["prefix"] == "A photo depicts "
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").touch()
    unavailable = scored(images, f"clip={tmp_path / 'empty'}")["clipscore"]
    assert unavailable.value is None and str(tmp_path / "empty") in unavailable.note
    (images / "00002.png").unlink()
    fewer = scored(images, f"clip={clip}")["clipscore"]
    assert (fewer.n, fewer.skipped) == (3, 1) and "missing image (1, such as 00002.png)" in fewer.note
    assert fewer.value == pytest.approx(float(torch.cat([cosines[:2], cosines[3:]]).mean()), abs=1e-6)
