"""External tokenizers: imported by name, checked on every call, and measured beside QLIP."""

import shutil

import numpy as np
import pytest
import torch
from mean_colour import MeanColour
from PIL import Image

from eval.metrics.reconstruction import psnr
from eval.report.report import main as report
from eval.run import main
from eval.scores import read_scores
from tokenizer.images import decode_codes, encode_images, open_external_tokenizer
from um3.core.errors import UserError


def test_a_tokenizer_by_name_encodes_and_decodes_in_batches(scenes):
    tokenizer = open_external_tokenizer("mean_colour:coarse", setting="mean")
    assert (tokenizer.image_size, tokenizer.num_bits, tokenizer.num_codes) == (32, 12, 16)
    originals, _ = scenes
    for batch_size in (7, 64):
        codes = encode_images(tokenizer, originals, batch_size=batch_size)
        assert torch.equal(codes, MeanColour().encode(originals))
        assert (decode_codes(tokenizer, codes, batch_size=batch_size) == MeanColour().decode(codes)).all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mean_colour", "package.module:function"),
        ("..mean_colour:coarse", "package.module:function"),
        ("no_such_module:coarse", "no_such_module.*PYTHONPATH"),
        ("mean_colour:finest", "function without arguments"),
        ("mean_colour:NO_FUNCTION", "function without arguments"),
        ("mean_colour:needs_an_argument", "'size'"),
        ("mean_colour:nothing", "image_size is None"),
        ("mean_colour:too_small", "image_size is 8.* from 11"),
        ("mean_colour:no_decode", "no method decode"),
        ("mean_colour:too_few_bits", "num_bits"),
        ("mean_colour:other_number_of_codes", r"encode .*\(2, 16\).*\(2, 9\)"),
        ("mean_colour:narrow_codes", "encode .*int32"),
        ("mean_colour:float_images", "decode .*float64"),
        ("mean_colour:one_image", r"decode .*\(1, 32, 32, 3\).*\(2, "),
    ],
)
def test_broken_tokenizers_are_one_line_errors(target, message):
    with pytest.raises(UserError, match=message) as caught:
        open_external_tokenizer(target, setting="mine", min_image_size=11)
    assert "mine" in str(caught.value)


def test_fingerprints_tell_tokenizers_apart():
    names = ("coarse", "larger", "named", "shifted")
    prints = [open_external_tokenizer(f"mean_colour:{name}", setting="mine").fingerprint for name in names]
    assert prints[0] == open_external_tokenizer("mean_colour:coarse", setting="mine").fingerprint
    assert prints[2] == "mean_colour:named v2" and len({part.split(" ")[1] for part in prints}) == 4


SETTINGS = ["parts=[tokenizer]", "tokenizer.num_images=12", "tokenizer.digits=false", "num_threads=1"]
EXTERNAL = "tokenizer.external={mean: 'mean_colour:coarse', fine: 'mean_colour:larger'}"


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory):
    """A run with two external tokenizers, one of another image size."""
    run = shutil.copytree(run_folder, tmp_path_factory.mktemp("runs") / "external")
    main([f"run={run}", *SETTINGS, EXTERNAL])
    return run


def test_external_tokenizers_have_rows_beside_qlips(evaluated):
    rows = {row.key: row for row in read_scores(evaluated / "eval" / "tokenizer.json")}
    for source in ("scenes", "digits"):
        for name, bits, note in (("mean", 192, "1/128 of"), ("fine", 2592, "1/21.33 of"), ("stage2", 128, "1/192 of")):
            task = f"{source}_reconstruction_{name}"
            measured = {"psnr", "ssim", "bits_per_image", "frechet_distance[random-features]"}
            assert all(rows[f"{task}/{metric}"].value is not None for metric in measured)
            assert rows[f"{task}/bits_per_image"].value == bits and note in rows[f"{task}/bits_per_image"].note
            assert rows[f"{task}/psnr"].n == 12 and (rows[f"{task}/psnr"].paper is None) == (name != "stage2")
            assert rows[f"{task}/lpips"].value is None and "tokenizer.perceptual" in rows[f"{task}/lpips"].note
        same = [rows[f"{source}_reconstruction_{name}/ssim"].protocol_hash for name in ("mean", "stage2", "fine")]
        assert same[0] == same[1] != same[2], "images of one size are comparable, those of another are not"
    with np.load(evaluated / "eval" / "tokenizer.npz") as arrays:
        originals, rebuilt = arrays["scenes_original"], arrays["scenes_mean"]
        assert (rebuilt == MeanColour().decode(MeanColour().encode(originals))).all()
        assert arrays["digits_fine"].shape == (12, 48, 48, 3)
        assert "scenes_fine" not in arrays, "scenes of another size are other scenes"
    expected = float(psnr(rebuilt, originals_BHWC=originals).mean())
    assert rows["scenes_reconstruction_mean/psnr"].value == pytest.approx(expected)
    assert rows["scenes_reconstruction_fine/psnr"].value > rows["scenes_reconstruction_mean/psnr"].value


@pytest.mark.slow
def test_their_images_are_in_the_report(evaluated, run_folder, tmp_path):
    report(["--run", str(evaluated)])
    with Image.open(evaluated / "figures" / "reconstructions.png") as figure:
        height = figure.height
    assert "<span>mean<br>" in (evaluated / "report.html").read_text()
    alone = shutil.copytree(run_folder, tmp_path / "alone")
    main([f"run={alone}", *SETTINGS])
    report(["--run", str(tmp_path / "alone")])
    with Image.open(tmp_path / "alone" / "figures" / "reconstructions.png") as figure:
        assert height > figure.height, "one row of images per tokenizer"
    heroes = [(run / "figures" / "hero.png").read_bytes() for run in (evaluated, tmp_path / "alone")]
    assert heroes[0] == heroes[1], "the hero image is QLIP's"


def test_qlip_features_serve_tokenizers_of_any_size(evaluated, tmp_path):
    main([f"run={evaluated}", f"output_dir={tmp_path}", *SETTINGS, EXTERNAL, "fid_features=qlip-features"])
    rows = {row.key: row for row in read_scores(tmp_path / "tokenizer.json")}
    values = [rows[f"scenes_reconstruction_{name}/frechet_distance[qlip-features]"].value for name in ("mean", "fine")]
    assert all(value is not None and np.isfinite(value) for value in values)
