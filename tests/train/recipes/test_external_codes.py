"""Codes of an external tokenizer: `make codes`, and a LlamaGen that trains on them and generates with its decoder."""

import numpy as np
import pytest

from data_mix.codes.encode import main as encode
from data_mix.codes.shards import open_code_sources
from data_mix.demo.scenes import ScenesSource
from downstream.llamagen.pipeline import LlamaGenPipeline
from downstream.pipelines import load_pipeline
from eval.tasks.generate_images import main as generate_images
from tests.helpers.mean_colour import MeanColour
from tests.train.conftest import arguments, encode_scenes, losses, train_here
from train.phase import main
from um3.core.errors import UserError

NAME = "tests.helpers.mean_colour:coarse"
EXTERNAL = f"external_tokenizer={NAME}"


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("external")
    for _ in range(2):  # the second time they are up to date
        encode_scenes(folder, EXTERNAL)
    return folder / "codes"


@pytest.fixture(scope="module")
def trained(made, codes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen") / "llamagen"
    main(arguments("llamagen", made, f"data.codes={codes}", EXTERNAL, f"loop.output_dir={folder}"))
    return folder / "model"


def test_the_shards_hold_its_codes_and_its_name(codes):
    shards = open_code_sources(codes, split="train")["scenes"]
    assert (shards.bits, shards.num_patches, shards.image_size) == (12, 16, 32)
    assert shards.fingerprint.startswith(f"{NAME} ")
    scenes = {sample.key: sample for sample in ScenesSource(split="train", size=32, length=64, seed=0)}
    sample = shards[3]
    assert (sample.codes_N == MeanColour().encode(scenes[sample.key].image_HWC[None])[0]).all()


def test_llamagen_generates_with_its_decoder(trained, tmp_path):
    assert losses(trained.parent)[0] == pytest.approx(6 * np.log(2), abs=1e-5)
    pipeline = LlamaGenPipeline.from_pretrained(trained, external_tokenizer=NAME)
    generated = pipeline.generate(["a red circle", "two squares"], seed=3)
    assert (generated.arrays == MeanColour().decode(generated.codes)).all()
    kept = pipeline.inpaint(generated.images[:1], ["a circle"], redraw=(0.5, 0.5, 1.0, 1.0))
    assert kept.arrays.shape == (1, 32, 32, 3) and not pipeline.can_rank
    with pytest.raises(UserError, match="needs QLIP's own towers"):
        pipeline.similarity(generated.arrays, generated.prompts)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    generate_images([f"model={trained}", f"prompts={prompts}", f"output_dir={tmp_path}/out", EXTERNAL])
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_what_is_missing_is_one_line(made, codes, trained, tmp_path):
    with pytest.raises(UserError, match=f"{NAME}.*make llamagen with {EXTERNAL}"):
        train_here("um3", made, tmp_path / "um3", f"data.codes={codes}")
    with pytest.raises(UserError, match=f"with external_tokenizer='{NAME}'"):
        load_pipeline(trained)
    with pytest.raises(UserError, match=r"was trained with .*:coarse .*, not .*:shifted "):
        load_pipeline(trained, external_tokenizer=NAME.replace("coarse", "shifted"))
    with pytest.raises(UserError, match=r"external_tokenizer.*package\.module:function"):
        encode(["--config", "demo", "external_tokenizer=mean_colour", f"output_dir={tmp_path}/codes"])
