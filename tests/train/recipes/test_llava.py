"""`make llava-align` and `make llava-instruct` at a tiny size: what trains and is written, resume, ranks, mistakes."""

import json

import pytest
import torch
from safetensors import safe_open

from downstream.llava.modeling import load_llava
from tests.helpers.llava_files import entry, write_conversations
from tests.helpers.processes import ROOT
from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_language_model
from tests.train.conftest import COMMON, check_resumed, losses, train_apart
from train.phase import main
from train.recipes import llava as recipe
from train.recipes.llava import LlavaObjective
from um3.core.errors import UserError
from um3.core.hub import read_weights
from um3.core.metrics import read_metrics

SETTINGS = [*COMMON, "warmup_share=0", "optimizer.kind=adamw", "optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with `language`, `qlip` and `conversations.json`."""
    folder = tmp_path_factory.mktemp("parts")
    save_language_model(folder / "language")
    make_qlip(folder / "qlip")
    write_conversations(folder)
    return folder


def command(phase, parts, folder, *overrides):
    """Command line of a tiny `phase` in `folder`, with a batch of texts in every four."""
    source = f"{{name: talk, kind: llava, path: {parts}/conversations.json, images: {parts}, val_fraction: 0}}"
    config = [phase, "--config", str(ROOT / "configs/demo.yaml"), f"loop.output_dir={folder}"]
    start = {
        "llava-align": [f"language_model={parts}/language", f"visual_tokenizer={parts}/qlip"],
        "llava-instruct": [f"init_from={parts}/llava-align/model"],
    }[phase]
    return [*config, *SETTINGS, "data.max_tokens=400", f"data.conversations=[{source}]", *start, *overrides]


@pytest.fixture(scope="module")
def aligned(parts):
    folder = parts / "llava-align"
    main(command("llava-align", parts, folder))
    return folder


@pytest.fixture(scope="module")
def trained(parts, aligned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "llava-instruct"
    main(command("llava-instruct", parts, folder))
    return folder


def test_the_first_stage_trains_the_projector_alone(parts, aligned):
    weights = read_weights(aligned / "model")
    qlip, language = read_weights(parts / "qlip"), read_weights(parts / "language")
    for name, tensor in weights.items():
        if name.startswith("vision_tower."):
            assert torch.equal(tensor, qlip[name.removeprefix("vision_tower.")]), name
    rows = weights["language_model.model.embed_tokens.weight"]
    assert torch.equal(rows[:280], language["model.embed_tokens.weight"])
    with safe_open(aligned / "checkpoints/step-00000004/model-00000.safetensors", framework="pt") as file:
        assert {name.split(".")[2] for name in file.keys()} == {"multi_modal_projector"}  # noqa: SIM118
    assert all(row["train/loss"] > 0 for row in read_metrics(aligned / "metrics.jsonl"))


def test_the_second_stage_trains_projector_and_language_model(aligned, trained):
    before, after = read_weights(aligned / "model"), read_weights(trained / "model")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"multi_modal_projector", "language_model"}
    model, processor = load_llava(trained / "model")
    assert model.config.vision_feature_layer == -2 and processor.image_processor.do_pad
    rows = read_metrics(trained / "metrics.jsonl")
    assert {row["data/has_image"] for row in rows} == {0.0, 1.0} and len(rows) == 4


def test_the_loss_is_transformers_own(parts, aligned):
    """The mean of the supervised tokens' cross entropy."""
    model = load_llava(aligned / "model").model
    objective = LlavaObjective(model, chunk_tokens=64)
    image = [model.config.image_token_id] * 4
    ids_BT = torch.tensor([[0, *image, *range(30, 45)], [0, 7, *image, *range(50, 64)]])
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    mask_BT[:, -5:] = True
    pixels_BCHW = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.where(mask_BT, ids_BT, -100)
    stock = model(input_ids=ids_BT, pixel_values=pixels_BCHW, labels=labels_BT).loss
    torch.testing.assert_close(objective(ids_BT, mask_BT, pixels_BCHW) / 10, stock)


def test_a_run_in_two_parts_is_the_run_in_one_to_the_bit(parts, trained, tmp_path):
    check_resumed(command("llava-instruct", parts, tmp_path), trained, tmp_path)


def test_two_processes_and_micro_batches_agree_with_one(parts, trained, tmp_path):
    whole = losses(trained)
    train_apart(command("llava-instruct", parts, tmp_path / "two", "engine.zero_stage=3"), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(whole, abs=1e-5)
    options = ["loop.micro_batch_size=2", "engine.activation_checkpointing=true"]
    main(command("llava-instruct", parts, tmp_path / "micro", *options))
    assert losses(tmp_path / "micro") == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("phase", ["llava-align", "llava-instruct"])
@pytest.mark.parametrize("stage", [0, 2])
def test_every_zero_stage_gives_the_same_losses(phase, stage, parts, aligned, trained, tmp_path):
    main(command(phase, parts, tmp_path / "run", f"engine.zero_stage={stage}"))
    assert losses(tmp_path / "run") == pytest.approx(losses(aligned if "align" in phase else trained), abs=1e-5)
    assert read_weights(tmp_path / "run/model").keys() == read_weights(trained / "model").keys()


def test_pure_bf16_is_saved_as_config_json_says(parts, aligned, tmp_path):
    options = ["engine.precision=bf16-true", "engine.zero_stage=2", "dtype=bfloat16"]
    main(command("llava-instruct", parts, tmp_path / "run", *options))
    tensors = read_weights(tmp_path / "run/model")
    assert {tensor.dtype for name, tensor in tensors.items() if ".freqs_" not in name} == {torch.bfloat16}
    qlip = read_weights(parts / "qlip")
    name = "vision_model.encoder.layers.0.self_attn.rope.freqs_cos"
    assert torch.equal(tensors[f"vision_tower.{name}"], qlip[name]) and qlip[name].dtype == torch.float32
    assert load_llava(tmp_path / "run/model").model.dtype == torch.bfloat16


def test_unusable_conversations_stop_the_run_above_one_percent(parts, aligned, tmp_path, monkeypatch):
    entries = [entry(index, None, "yes") for index in range(40)]
    entries[0]["conversations"][0]["value"] = "long " * 400
    write_conversations(tmp_path)
    (tmp_path / "conversations.json").write_text(json.dumps(entries))
    (tmp_path / "llava-align").symlink_to(aligned)
    monkeypatch.setattr(recipe, "MIN_COUNTED", 40)
    with pytest.raises(UserError, match=r"1 of 4\d conversations could not be used.*no answer within the window"):
        main(command("llava-instruct", tmp_path, tmp_path / "run", "loop.max_steps=20"))


@pytest.mark.parametrize(
    ("phase", "overrides", "message"),
    [
        ("llava-align", ["language_model=''"], "language_model is empty"),
        ("llava-align", ["language_model=./nowhere"], "make um3-export`"),
        ("llava-align", ["language_model=./no/um3-export"], r"make um3-export MODEL=\./no/um3/model`"),
        ("llava-align", ["visual_tokenizer=./nowhere"], "make stage2"),
        ("llava-align", ["vision_feature_layer=0"], "vision_feature_layer=0"),
        ("llava-align", ["quantized_features=true"], "vision_feature_layer=-1"),
        ("llava-align", ["data.max_tokens=600"], "512 positions"),
        ("llava-align", ["data.max_tokens=8"], "no room for an answer"),
        ("llava-align", ["warmup_share=0.1"], "warmup_share and optimizer.warmup_steps"),
        ("llava-instruct", ["init_from=./nowhere"], "make llava-align"),
        ("llava-instruct", ["data.conversations=[{name: a, kind: scenes}, {name: a, kind: digits}]"], "own name"),
    ],
)
def test_mistakes_are_one_line(phase, overrides, message, parts, aligned, tmp_path):
    with pytest.raises(UserError, match=message):
        main(command(phase, parts, tmp_path / "run", *overrides))
