"""Scoring folders of drawn images: distances by hand, what resumes, what is left out, and what is a hole."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks import folder_moments
from eval.benchmarks.coco_generation import main
from eval.command import LeftOut
from eval.metrics.clipscore import clip_cosines, load_clip
from eval.metrics.features import inception_features, random_features
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception import PREPROCESSINGS
from eval.scores import read_scores
from tests.helpers import tiny_judges
from um3.core.errors import UserError
from um3.core.files import sha256_of
from um3.inference.image_io import save_png

RANDOM = "frechet_distance[random-features]"


def pictures(*, count, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256 - 100 * seed, (count, side, side, 3)).astype(np.uint8)


def folder(path, images):
    for index, image in enumerate(images):
        save_png(image, path / f"{index:02d}.png")
    return path


@pytest.fixture
def drawn(tmp_path):
    return folder(tmp_path / "drawn", pictures(count=12, seed=0))


@pytest.fixture
def real(tmp_path):
    return folder(tmp_path / "real", pictures(count=9, seed=1))


def scored(images, *options):
    main([f"images={images}", *options])
    return {row.metric: row for row in read_scores(f"{images}.json")}


def test_the_distance_is_that_of_the_features(drawn, real):
    rows = scored(drawn, f"reference={real}")
    network = random_features()
    expected = frechet_distance(network.moments(pictures(count=12, seed=0)), network.moments(pictures(count=9, seed=1)))
    assert rows[RANDOM].value == pytest.approx(expected, rel=1e-5) and rows[RANDOM].n == 12
    protocol = rows[RANDOM].protocol
    assert (protocol["drawn_images"], protocol["reference_images"]) == (12, 9)
    assert protocol["preparation"] == "largest centred square, Pillow's lanczos to 32, uint8"


def test_equal_sets_are_at_distance_zero_whatever_their_order(drawn, tmp_path):
    mixed = folder(tmp_path / "mixed", pictures(count=12, seed=0)[::-1])
    row = scored(drawn, f"reference={mixed}")[RANDOM]
    assert row.value == pytest.approx(0, abs=1e-6)
    pins = json.loads(drawn.with_name("drawn.json").read_text())["pins"]
    assert pins["drawn_sha256"] == row.protocol["reference_sha256"]


def test_without_weights_or_reference_the_rows_say_what_to_provide(drawn, real):
    rows = scored(drawn, f"reference={real}")
    for name in ("fid", "fid_clean"):
        assert rows[name].value is None and "pt_inception-2015-12-05-6726825d.pth" in rows[name].note
    assert "clip-vit-base-patch32" in rows["clipscore"].note
    rows = scored(drawn)
    assert set(rows) == {"fid", "fid_clean", "clipscore"} and "set reference=" in rows["fid"].note


def distance_of_pairs(first_2D, second_2D):
    """The Frechet distance of two sets of two vectors: their covariances have rank one, so it can be written down."""
    a, b = ((each[0] - each[1]).double() / 2**0.5 for each in (first_2D, second_2D))
    offset = first_2D.double().mean(0) - second_2D.double().mean(0)
    return float(offset @ offset + a @ a + b @ b - 2 * (a @ b).abs())


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    weights = tiny_judges.save_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
    return str(weights), sha256_of(weights)[:8]


@pytest.mark.slow
def test_fid_by_hand_against_statistics_of_pytorch_fid(inception, tmp_path):
    weights, sha256 = inception
    network = inception_features(weights, sha256=sha256)
    first, second = pictures(count=2, seed=0), pictures(count=2, seed=1)
    features = network.extract(second).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    drawn = folder(tmp_path / "drawn", first)
    options = [f"reference={tmp_path / 'stats.npz'}", f"inception_weights={weights}"]
    rows = scored(drawn, *options, f"inception_sha256={sha256}")
    expected = distance_of_pairs(network.extract(first), network.extract(second))
    assert rows["fid"].value == pytest.approx(expected, rel=1e-4) and rows["fid"].paper == 44.1
    assert rows["fid"].protocol["features"] == "inception-2015 pytorch-fid"
    assert "2 images for 2048 dimensions" in rows["fid"].note
    assert rows["fid_clean"].value is None and "no statistics for inception-2015 clean-fid" in rows["fid_clean"].note
    with pytest.raises(UserError, match="is not the published file"):
        scored(drawn, *options)


def test_a_folder_is_measured_once_for_every_preprocessing(inception, drawn, tmp_path):
    weights, sha256 = inception
    networks = [inception_features(weights, sha256=sha256, preprocessing=name) for name in PREPROCESSINGS]
    files = {file.name: file for file in sorted(drawn.iterdir())[:2]}
    common = {"preparation": "as it is", "to_array": np.asarray, "label": "measure", "left_out": LeftOut()}
    found = folder_moments.measure(files, networks=networks, file=tmp_path / "m.safetensors", **common)
    assert list(found.moments) == [f"inception-2015 {name}" for name in PREPROCESSINGS]
    for network, moments in zip(networks, found.moments.values(), strict=True):
        expected = network.moments(pictures(count=12, seed=0)[:2])
        torch.testing.assert_close(moments.mean, expected.mean)
        torch.testing.assert_close(moments.covariance, expected.covariance)
    means = [moments.mean for moments in found.moments.values()]
    assert not torch.allclose(means[0], means[1], rtol=1e-3) and not torch.allclose(means[0], means[2], rtol=1e-3)


def test_images_are_left_out_by_name_and_number(drawn, real):
    (drawn / "03.png").write_bytes(b"no image")
    save_png(pictures(count=1, seed=0, side=16)[0], drawn / "00.png")
    row = scored(drawn, f"reference={real}")[RANDOM]
    assert (row.n, row.skipped) == (10, 2)
    assert "unreadable image: not an image (1, such as 03.png)" in row.note
    assert "image of another size (1, such as 00.png)" in row.note
    left_out = json.loads(drawn.with_name("drawn.json").read_text())["left_out"]
    assert left_out["image of another size"] == {"count": 1, "first": ["00.png"]}


def test_real_images_of_any_shape_are_cropped_and_resized(drawn, tmp_path):
    wide = np.random.default_rng(3).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    (tmp_path / "real").mkdir()
    for index in range(3):
        Image.fromarray(np.roll(wide, index, axis=0)).save(tmp_path / "real" / f"{index}.png")
    squares = [
        Image.fromarray(np.roll(wide, i, axis=0)[:, 16:80]).resize((32, 32), Image.Resampling.LANCZOS) for i in range(3)
    ]
    network = random_features()
    found = network.moments(np.stack([np.asarray(square) for square in squares]))
    expected = frechet_distance(network.moments(pictures(count=12, seed=0)), found)
    assert scored(drawn, f"reference={tmp_path / 'real'}")[RANDOM].value == pytest.approx(expected, rel=1e-5)
    assert scored(drawn, f"reference={tmp_path / 'real'}", "resize=bicubic")[RANDOM].value != pytest.approx(
        expected, rel=1e-5
    )


def test_the_statistics_of_a_reference_serve_again(drawn, real, tmp_path):
    first = scored(drawn, f"reference={real}")[RANDOM]
    kept = drawn.with_name("drawn.reference.safetensors")
    shutil.rmtree(real)
    again = scored(drawn, f"reference={kept}")[RANDOM]
    assert again.value == first.value and again.protocol == first.protocol
    with pytest.raises(UserError, match=r"was made otherwise \(preparation: .*lanczos to 32.* -> .*bicubic to 32"):
        scored(drawn, f"reference={kept}", "resize=bicubic")
    with pytest.raises(UserError, match="holds no statistics"):
        (tmp_path / "x.safetensors").write_bytes(b"nothing")
        scored(drawn, f"reference={tmp_path / 'x.safetensors'}")


def test_a_file_of_other_statistics_is_one_line(drawn, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    rows = scored(drawn, f"reference={tmp_path / 'stats.npz'}")
    assert rows[RANDOM].value is None and "no statistics for random-features" in rows[RANDOM].note
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(UserError, match="holds no mu and sigma"):
        scored(drawn, f"reference={tmp_path / 'other.npz'}")


def test_a_killed_measurement_goes_on_to_the_same_bits(drawn, real, monkeypatch):
    whole = scored(drawn, f"reference={real}")[RANDOM]
    drawn.with_name("drawn.drawn.safetensors").unlink()
    monkeypatch.setattr(folder_moments, "BATCH", 5)
    monkeypatch.setattr(folder_moments, "SAVE_EVERY", 5)
    reads, read_image = [], folder_moments.read_image

    def dies(path):
        reads.append(path.name)
        if len(reads) == 8:
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(folder_moments, "read_image", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(drawn, f"reference={real}")
    reads[:] = [""] * 100
    again = scored(drawn, f"reference={real}")[RANDOM]
    assert reads[100:] == [f"{index:02d}.png" for index in range(5, 12)], "the reference was kept whole"
    assert again.value == pytest.approx(whole.value, rel=1e-9) and again.protocol == whole.protocol


def test_changed_images_are_measured_again(drawn, real):
    first = scored(drawn, f"reference={real}")[RANDOM].value
    save_png(np.zeros((32, 32, 3), dtype=np.uint8), drawn / "00.png")
    assert scored(drawn, f"reference={real}")[RANDOM].value != first


def test_clipscore_by_three_conventions(um3_folder, tmp_path):
    from eval.benchmarks.generate_images import main as draw

    prompts = ["a photo of a dog", "a red cat", "a blue dog", "yes or no"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    out = tmp_path / "out"
    draw([f"model={um3_folder}", f"prompts={tmp_path / 'prompts.txt'}", f"output_dir={out}"])
    clip_folder = tiny_judges.save_clip(tmp_path / "clip")
    images = [np.asarray(Image.open(out / f"{index:05d}.png")) for index in range(4)]
    cosines = clip_cosines(np.stack(images), texts=prompts, clip=load_clip(str(clip_folder)))
    rows = scored(out, f"clip={clip_folder}")
    assert rows["clipscore"].value == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert rows["clipscore"].low <= rows["clipscore"].value <= rows["clipscore"].high
    assert rows["clipscore_100"].value == pytest.approx(100 * max(float(cosines.mean()), 0), abs=1e-4)
    assert rows["clipscore_2.5"].value == pytest.approx(float(2.5 * cosines.clamp(min=0).mean()), abs=1e-5)
    prefixed = scored(out, f"clip={clip_folder}", "clip_prefix='A photo depicts '")["clipscore"]
    assert prefixed.value != rows["clipscore"].value and prefixed.protocol["prefix"] == "A photo depicts "
    unreachable = scored(out, "clip=nobody/nothing")["clipscore"]
    assert unreachable.value is None and "no CLIP at 'nobody/nothing'" in unreachable.note
    (out / "00002.png").unlink()
    fewer = scored(out, f"clip={clip_folder}")["clipscore"]
    assert (fewer.n, fewer.skipped) == (3, 1) and "missing image (1, such as 00002.png)" in fewer.note
    expected = torch.cat([cosines[:2], cosines[3:]]).mean()
    assert fewer.value == pytest.approx(float(expected), abs=1e-6)


def test_mistakes_are_one_line(drawn, tmp_path):
    with pytest.raises(UserError, match="set images=FOLDER"):
        main([])
    with pytest.raises(UserError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        scored(tmp_path / "empty")
    with pytest.raises(UserError, match="no reference at nowhere"):
        scored(drawn, "reference=nowhere")
    with pytest.raises(UserError, match="no Inception weights at nowhere"):
        scored(drawn, f"reference={drawn}", "inception_weights=nowhere")
    lone = folder(tmp_path / "lone", pictures(count=1, seed=0))
    with pytest.raises(UserError, match="fewer than two images can be used of 1"):
        scored(drawn, f"reference={lone}")
