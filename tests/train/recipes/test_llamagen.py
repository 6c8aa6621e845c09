"""`make llamagen` at a tiny size: what it learns and writes, and that a resumed run computes the same bits."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from downstream.llamagen.configuration import LlamaGenConfig
from downstream.llamagen.modeling import LlamaGen
from downstream.llamagen.pipeline import LlamaGenPipeline
from tests.train.conftest import arguments, check_resumed, logged, losses, train_here
from train.recipes.llamagen import LlamaGenObjective
from um3.core.errors import UserError


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("llamagen") / "llamagen"
    train_here("llamagen", made, folder)
    return folder


def test_the_first_loss_is_that_of_chance_and_the_folder_generates(trained, tmp_path):
    assert losses(trained)[0] == pytest.approx(6 * np.log(2), abs=1e-5)
    per_image = 2 * 16 * np.array(losses(trained))
    assert logged(trained, "train/nats_per_image") == pytest.approx(per_image, rel=1e-6)
    pipeline = LlamaGenPipeline.from_pretrained(trained / "model")
    assert len(pipeline.text_encoder.model.encoder.layers) == 0  # the demo's captions are embeddings
    generated = pipeline.generate(["a circle", "two squares"], num_images=2, seed=3, guidance_scale=2.0)
    again = pipeline.generate(["two squares"], seeds=generated.seeds[3:], guidance_scale=2.0)
    assert np.array_equal(generated.arrays[3], again.arrays[0]) and generated.arrays.shape == (4, 32, 32, 3)
    kept = pipeline.inpaint(generated.arrays[:1], ["a circle"], redraw=(0.5, 0.5, 1.0, 1.0))
    is_kept_N = np.isin(np.arange(16), kept.settings["redrawn_patches"], invert=True)
    before_N = pipeline.encode(generated.arrays[:1])[0]
    assert is_kept_N.sum() == 12 and torch.equal(kept.codes[0][is_kept_N], before_N[is_kept_N])
    pipeline.to(torch.bfloat16).to(torch.float32).save_pretrained(tmp_path / "saved")
    rounded = pipeline(["a circle"], seed=3).codes
    assert torch.equal(LlamaGenPipeline.from_pretrained(tmp_path / "saved")(["a circle"], seed=3).codes, rounded)
    card = (trained / "model/README.md").read_text()
    assert "pipeline_tag: text-to-image\n" in card and "16 codes of 12 bits" in card and pipeline.fingerprint in card
    assert (tmp_path / "saved/README.md").read_text() == card


def test_a_run_in_two_parts_and_two_processes_agree_with_one(made, trained, tmp_path):
    check_resumed(arguments("llamagen", made), trained, tmp_path, processes=2)


def test_every_process_draws_its_own_dropout(made, trained, tmp_path, monkeypatch):
    options = ("model.dropout=0.5", "loop.max_steps=2")
    first = train_here("llamagen", made, tmp_path / "first", *options)
    monkeypatch.setattr("train.loop.rank", lambda: 1)
    assert train_here("llamagen", made, tmp_path / "second", *options) != first
    assert train_here("llamagen", made, tmp_path / "without", "loop.max_steps=4") == losses(trained)


DEPTH = ("model.prediction=depth", "model.subtokens=2", "model.depth_layers=2")


def test_one_position_a_patch_trains_resumes_and_generates(made, tmp_path):
    whole = train_here("llamagen", made, tmp_path / "whole", *DEPTH)
    assert whole[0] == pytest.approx(6 * np.log(2), abs=1e-5)
    assert logged(tmp_path / "whole", "train/nats_per_image") == pytest.approx(2 * 16 * np.array(whole), rel=1e-6)
    assert any(name.startswith("depth.1.") for name in load_file(tmp_path / "whole/model/model.safetensors"))
    check_resumed(arguments("llamagen", made, *DEPTH), tmp_path / "whole", tmp_path, processes=2)
    pipeline = LlamaGenPipeline.from_pretrained(tmp_path / "whole/model")
    generated = pipeline.generate(["a circle", "two squares"], num_images=2, seed=3, guidance_scale=2.0)
    again = pipeline.generate(["two squares"], seeds=generated.seeds[3:], guidance_scale=2.0)
    assert np.array_equal(generated.arrays[3], again.arrays[0])
    with pytest.raises(UserError, match=r"model\.subtokens"):
        train_here("llamagen", made, tmp_path / "one", *DEPTH, "model.subtokens=1")


@pytest.mark.parametrize("prediction", ["flat", "depth"])
def test_the_loss_by_chunks_has_the_gradient_of_the_whole(prediction):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    shapes = {"caption_width": 8, "num_patches": 16, "subtokens": 2, "bits_per_subtoken": 6, "dropout": 0.0}
    model = LlamaGen(LlamaGenConfig(**sizes, **shapes, prediction=prediction))
    torch.nn.init.normal_(model.output.weight, std=0.1)
    captions = {"features_BTC": torch.randn(3, 5, 8), "caption_mask_BT": torch.ones(3, 5)}
    inputs = captions | {"ids_BP": torch.randint(0, 64, (3, 32))}
    whole = F.cross_entropy(model.logits(model(**inputs)).flatten(0, 1), inputs["ids_BP"].flatten(), reduction="sum")
    expected = torch.autograd.grad(whole, list(model.parameters()))
    chunked = LlamaGenObjective(model, chunk_tokens=7)(*inputs.values(), torch.zeros(3, dtype=torch.bool)).sum()
    torch.testing.assert_close(chunked, whole)
    for ours, theirs in zip(torch.autograd.grad(chunked, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.zero_stage=0", "loop.micro_batch_size=2"),
        ("engine.zero_stage=3", "optimizer.kind=adamw"),
        ("engine.activation_checkpointing=true",),
    ],
)
def test_engines_agree(made, trained, tmp_path, overrides):
    expected = losses(trained)
    if "optimizer.kind=adamw" in overrides:
        expected = train_here("llamagen", made, tmp_path / "reference", "optimizer.kind=adamw")
    assert train_here("llamagen", made, tmp_path / "run", *overrides) == pytest.approx(expected, abs=1e-5)


def test_it_learns_a_few_images(made, tmp_path):
    options = ("loop.max_steps=60", "loop.batch_size=16", "data.caption_dropout=0", "optimizer.lr=1e-2")
    learnt = train_here("llamagen", made, tmp_path, *options, "loop.save_every_steps=60")
    assert learnt[-1] < 0.7 * learnt[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_encoder": {"max_token": 8}}, "unknown key 'max_token'; did you mean"),
        ({"text_encoder": {"name": "${oc.env:HOME}"}}, "is not a plain value"),
        ({"num_patches": 4}, "num_patches is 4, but its tokenizer and text encoder need 16"),
        ({"num_patches": 0}, "must be at least 1"),
        ({"subtokens": 1, "bits_per_subtoken": 7}, "subtokens x bits_per_subtoken is 7, but .* need 12"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_a_stored_config_that_fits_nothing_is_one_line(trained, tmp_path, changed, message):
    shutil.copytree(trained / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    changed = {key: config[key] | value if isinstance(value, dict) else value for key, value in changed.items()}
    (tmp_path / "model/config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=message):
        LlamaGenPipeline.from_pretrained(tmp_path / "model")


def test_the_command_and_the_evaluation_take_either_kind_of_model(trained, made, tmp_path):
    from typer.testing import CliRunner

    from eval.run import main as evaluate
    from um3.cli import app

    model = str(trained / "model")
    arguments = ["generate", "a circle", "-n", "2", "--model", model, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2
    evaluation = [
        *(f"model={model}", f"run={made}", f"output_dir={tmp_path}/eval", "parts=[generation]", "num_threads=1"),
        *("images=[{name: scenes, kind: scenes, length: 64}]", "generation.num_images=4", "generation.per_skill=2"),
    ]
    evaluate(evaluation)
    assert (tmp_path / "eval/generation.json").is_file()
    with pytest.raises(UserError, match="captions need a UM3"):
        evaluate([setting.replace("generation]", "captions]") for setting in evaluation])
