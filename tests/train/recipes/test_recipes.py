"""The three recipes end to end at the smallest size, through the real engine and the real files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.helpers.processes import run_on_ranks
from tests.tokenizer.conftest import tiny_config
from tests.tokenizer.test_pretrained import eva_file
from tests.train.conftest import arguments, losses, run_apart, run_here
from tokenizer import load
from tokenizer.modeling import QLIPModel
from train.recipes.stage2 import Autoencoder
from um3.core.distributed import rank, world_size
from um3.core.errors import UserError
from um3.core.metrics import read_metrics
from um3.inference.pipeline import UM3Pipeline
from um3.model.text_tokenizer import train_text_tokenizer


def test_stage1_leaves_a_tokenizer_and_its_record(made: Path) -> None:
    model, processor = load(made / "stage1/model")
    codes = model.encode(torch.zeros(1, 3, 32, 32))
    assert codes.shape == (1, 16)
    assert processor.text(["a red circle"])["input_ids"].shape[0] == 1
    done = json.loads((made / "stage1/done.json").read_text())
    assert done["fingerprint"] == model.fingerprint() and done["steps"] == 4
    row = read_metrics(made / "stage1/metrics.jsonl")[-1]
    weighted = sum(weight * row[f"train/{name}"] for name, weight in done["config"]["loss"].items())
    assert row["train/loss"] == pytest.approx(weighted, rel=1e-5)


def test_a_loss_that_is_not_finite_names_terms_rank_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["optimizer.kind=adamw", "optimizer.lr=1e30", "optimizer.grad_clip=0"]
    with pytest.raises(UserError) as caught:
        run_here(monkeypatch, arguments("stage1", tmp_path, *options))
    line = str(caught.value)
    assert (
        "train/mse is nan" in line and "on rank 0 (images of scenes: scenes-train-0-" in line and "weighted" not in line
    )
    assert line.startswith("step ") and not (tmp_path / "stage1/model").exists()


def test_stage1_starts_from_an_encoder_of_another_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _ = load(made / "stage1/model")
    options = [f"model.encoder_weights={eva_file(given, tmp_path / 'eva.pt')}", "optimizer.lr=1e-9"]
    run_here(monkeypatch, arguments("stage1", tmp_path, *options, "loop.seed=5", "loop.max_steps=1"))
    model, _ = load(tmp_path / "stage1/model")
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.vision_features(pixels), given.vision_features(pixels))
    assert not torch.allclose(model.encode(pixels).float(), given.encode(pixels).float())  # the bottleneck is fresh
    with pytest.raises(UserError, match=r"model\.start brings all weights"):
        run_here(monkeypatch, arguments("stage1", tmp_path / "both", *options, f"model.init_from={made}/stage1/model"))


def test_stage2_trains_bottleneck_and_decoder_only(made: Path) -> None:
    before, _ = load(made / "stage1/model")
    after, _ = load(made / "stage2/model")
    changed = {
        name for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(old, new)
    }  # fmt: skip
    assert changed and all(name.startswith(("vision_model.quant_embed", "vision_decoder.")) for name in changed)
    rows = read_metrics(made / "stage2/metrics.jsonl")
    assert "train/adversarial" not in rows[0] and "train/adversarial" in rows[1]
    assert json.loads((made / "stage2/done.json").read_text())["perceptual"] == "random_features"


@pytest.mark.parametrize("override", ["loop.micro_batch_size=2", "engine.zero_stage=3"])
def test_stage2_losses_do_not_depend_on_how_the_engine_runs(
    override: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The entropy of the mean code is the one term that is no mean over images.
    options = ["loss.entropy=0", "loss.r1=0.1", "optimizer.kind=adamw"]
    run_here(monkeypatch, arguments("stage2", made, f"loop.output_dir={tmp_path}/plain", *options))
    run_here(monkeypatch, arguments("stage2", made, f"loop.output_dir={tmp_path}/other", *options, override))
    plain, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "other"))
    for name in ("loss", "mse", "perceptual", "discriminator", "r1"):
        found, expected = ([row[f"train/{name}"] for row in rows] for rows in (other, plain))
        assert found == pytest.approx(expected, rel=1e-3), name
    assert other[-1]["optim/grad_norm"] == pytest.approx(plain[-1]["optim/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_stage2_with_a_residual_discriminator_and_its_penalty(
    zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = ["discriminator.kind=residual", "loss.adversarial_kind=non_saturating", f"engine.zero_stage={zero_stage}"]
    for name, r1 in (("free", 0), ("held", 1000)):
        options = [*critic, f"loss.r1={r1}", "discriminator_optimizer.lr=1e-2"]
        run_here(monkeypatch, arguments("stage2", made, f"loop.output_dir={tmp_path}/{name}", *options))
    free, held = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("free", "held"))
    assert "train/r1" not in free[0] and held[-1]["train/r1"] < 0.75 * held[0]["train/r1"]
    for row in held:
        terms = [value for name, value in row.items() if name.startswith("weighted/")]
        assert row["train/loss"] == pytest.approx(sum(terms), rel=1e-5) and len(terms) >= 3


def changed_parts(before: Path, after: Path) -> set[str]:
    """The first two parts of the names of all tensors that differ."""
    old, new = (load(folder)[0].state_dict() for folder in (before, after))
    return {".".join(name.split(".")[:2]) for name in old if not torch.equal(old[name], new[name])}


def test_recipe_2_trains_towers_then_quantizer_then_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    options = [f"model.init_from={made}/stage1/model", "bottleneck=identity", f"loop.output_dir={tmp_path}/towers"]
    run_here(monkeypatch, arguments("stage1", tmp_path, *options))
    parts = changed_parts(made / "stage1/model", tmp_path / "towers/model")
    assert {"vision_model.encoder", "vision_decoder.encoder", "text_model.encoder"} <= parts
    assert not {"vision_model.quant_embed", "vision_model.quant_embed_post"} & parts
    row = read_metrics(tmp_path / "towers/metrics.jsonl")[-1]
    assert row["train/entropy"] == row["train/commitment"] == 0 and row["train/mse"] > 0

    trained = "trainable=[qlip.vision_model.quant_embed]"
    options = [f"model.init_from={tmp_path}/towers/model", trained, f"loop.output_dir={tmp_path}/quantizer"]
    run_here(monkeypatch, arguments("stage1", tmp_path, *options, "loss.contrastive=0"))
    parts = changed_parts(tmp_path / "towers/model", tmp_path / "quantizer/model")
    assert parts == {"vision_model.quant_embed", "vision_model.quant_embed_post"}

    options = [
        f"init_from={tmp_path}/quantizer/model",
        "trainable=[qlip.vision_decoder]",
        f"loop.output_dir={tmp_path}/last",
    ]
    run_here(monkeypatch, arguments("stage2", tmp_path, *options))
    parts = changed_parts(tmp_path / "quantizer/model", tmp_path / "last/model")
    assert parts and all(part.startswith("vision_decoder.") for part in parts)

    # What a finished run was started from is part of it.
    shutil.copytree(made / "stage1/model", tmp_path / "towers/model", dirs_exist_ok=True)
    with pytest.raises(UserError, match="made from other inputs"):
        run_here(monkeypatch, arguments("stage1", tmp_path, f"model.init_from={tmp_path}/towers/model", trained,
                                        f"loop.output_dir={tmp_path}/quantizer", "loss.contrastive=0"))  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "override", "message"),
    [
        ("stage1", "trainable=[qlip.vision_tower]", "no parameter's name starts with 'qlip.vision_tower'"),
        ("stage2", "trainable=[qlip.vision_model.encoder]", "stage 2 cannot train 'qlip.vision_model.encoder'"),
        ("stage2", "discriminator.num_layers=5", "does not fit images of 32 pixels"),
        ("stage1", "model.patch_size=7", "image_size 32 is not a multiple of patch_size 7"),
        ("stage2", "discriminator_optimizer.ema_decay=0.9", "no discriminator is saved"),
        ("stage1", "optimizer.ema_decay=1", "it must be in"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    phase: str, override: str, message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message):
        run_here(monkeypatch, arguments(phase, made, f"loop.output_dir={tmp_path}", override))


def test_gradient_norms_of_the_two_losses_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, arguments("stage1", tmp_path, "loop.output_dir=" + str(tmp_path / "plain")))
    options = ["gradient_norms=true", "engine.activation_checkpointing=true", "loop.log_every_steps=2"]
    run_here(monkeypatch, arguments("stage1", tmp_path, f"loop.output_dir={tmp_path}/logged", *options))
    rows = read_metrics(tmp_path / "logged/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert all(row[f"gradients/{name}"] > 0 for row in rows for name in ("contrastive", "mse"))
    assert losses(tmp_path / "logged")[1:] == pytest.approx(losses(tmp_path / "plain")[1::2], rel=1e-5)


def test_stage2_without_perceptual_and_adversarial_terms_builds_no_networks_for_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["loss.perceptual=0", "loss.adversarial=0", "perceptual.backbone=nowhere.pth"]
    run_here(monkeypatch, arguments("stage2", made, f"loop.output_dir={tmp_path}", *options))
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert {name for name in row if name.startswith("train/")} == {"train/loss", "train/mse", "train/entropy"}
    assert not list((tmp_path / "checkpoints").rglob("discriminator*"))
    assert json.loads((tmp_path / "done.json").read_text())["perceptual"] == "none"


@pytest.mark.parametrize("engine", ["zero_stage=0", "zero_stage=1", "zero_stage=2", "zero_stage=3"])
def test_the_saved_weights_are_the_average_that_was_asked_for(
    engine: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["optimizer.kind=adamw", "optimizer.ema_decay=0.75", "loop.keep_checkpoints=9", f"engine.{engine}"]
    options += ["loop.save_every_steps=1", "loop.micro_batch_size=4", f"loop.output_dir={tmp_path}"]
    run_here(monkeypatch, arguments("stage2", made, *options))
    average, before = {}, load(made / "stage1/model")[0].state_dict()
    for step in range(1, 5):
        saved = load_file(tmp_path / f"checkpoints/step-{step:08d}/model-00000.safetensors")
        params = {
            key.removeprefix("qlip.").removesuffix("/param"): value for key, value in saved.items() if "/p" in key
        }
        for name, value in params.items():
            average[name] = 0.75 * average.get(name, before[name]) + 0.25 * value
    model = load(tmp_path / "model")[0].state_dict()
    assert len(average) > 10 and not torch.equal(
        model["vision_decoder.conv_out.bias"], params["vision_decoder.conv_out.bias"]
    )
    for name, value in average.items():
        torch.testing.assert_close(model[name], value, rtol=1e-5, atol=1e-7)


def test_um3_leaves_a_stock_checkpoint_that_samples(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/um3"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "um3/model")
    assert type(stock).__module__.startswith("transformers.")
    pipeline = UM3Pipeline.from_pretrained(tmp_path / "um3/model")
    assert pipeline.generate(["a red circle"], seed=1).images.shape == (1, 32, 32, 3)
    trained = load_file(tmp_path / "um3/checkpoints/step-00000004/model-00000.safetensors")
    own_VD, bits_LD = (trained[f"{name}/param"] for name in ("model.lm_head.weight", "bits.output_LD"))
    last_D = own_VD[-1] + bits_LD[6:].sum(0)  # the last entry: every bit of the second subtoken is 1
    assert bits_LD.any() and torch.equal(stock.lm_head.weight[0], own_VD[0])
    torch.testing.assert_close(stock.lm_head.weight[-1], last_D)
    row = read_metrics(tmp_path / "um3/metrics.jsonl")[-1]
    assert row["data/rows_text"] + row["data/rows_i2t"] + row["data/rows_t2i"] == 8


def test_a_base_keeps_its_text_rows_and_gets_calibrated_gains(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_tokenizer = train_text_tokenizer(["a module of the standard library"] * 3, vocab_size=280)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(text_tokenizer), initializer_range=0.5, **sizes))
    for part in (base, text_tokenizer):
        part.save_pretrained(tmp_path / "base")
    options = [f"model.base_model={tmp_path}/base", "optimizer.lr=1e-9", "loop.max_steps=1"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/um3", *options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "um3/model")
    # The base's tokenizer had the image marks already: their rows are kept too.
    rows_VD, base_VD = model.model.embed_tokens.weight, base.model.embed_tokens.weight
    torch.testing.assert_close(rows_VD[: len(base_VD)], base_VD)
    attention = model.model.layers[0].self_attn
    for gain, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        # The base's queries and keys have an rms of about the root of the width times the weights' scale: 2.8, not 1.
        assert (gain.weight / (32**0.5 * projection.weight.std())).mean().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("override", ["engine.zero_stage=0", "engine.zero_stage=2", "engine.zero_stage=3",
                                      "loop.micro_batch_size=2", "engine.activation_checkpointing=true"])  # fmt: skip
def test_um3_losses_do_not_depend_on_how_the_engine_runs(
    override: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/plain", "engine.zero_stage=1"))
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/other", override))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_um3_in_low_precision_follows_float32(
    precision: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/plain"))
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/low", f"engine.precision={precision}"))
    assert losses(tmp_path / "low") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
    assert losses(tmp_path / "low") != losses(tmp_path / "plain")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("phase", ["stage1", "stage2"])
def test_the_tokenizer_in_low_precision_follows_float32(
    phase: str, precision: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["optimizer.kind=adamw", "engine.zero_stage=1"] + ["loss.r1=0.1"] * (phase == "stage2")
    low = [f"engine.precision={precision}", "loop.micro_batch_size=4"]
    run_here(monkeypatch, arguments(phase, made, f"loop.output_dir={tmp_path}/plain", *options))
    run_here(monkeypatch, arguments(phase, made, f"loop.output_dir={tmp_path}/low", *options, *low))
    assert losses(tmp_path / "low") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
    assert losses(tmp_path / "low") != losses(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2", "um3"])
def test_two_processes_train_like_one(phase: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, arguments(phase, made, f"loop.output_dir={tmp_path}/one"))
    result = run_apart(arguments(phase, made, f"loop.output_dir={tmp_path}/two"), processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=5e-3)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_muon_takes_the_same_steps_under_zero(
    zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["optimizer.kind=muon", "model.num_layers=3"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/whole", *options, "engine.zero_stage=0"))
    divided = arguments("um3", made, f"loop.output_dir={tmp_path}/divided", *options, f"engine.zero_stage={zero_stage}")
    result = run_apart(divided, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/adamw", "model.num_layers=3"))
    assert losses(tmp_path / "adamw")[-1] != pytest.approx(losses(tmp_path / "whole")[-1], rel=1e-4)


def test_bf16_weights_need_zero(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="zero_stage=1 or more"):
        low = ["engine.precision=bf16-true", "engine.zero_stage=0"]
        run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}", *low))


def test_muon_refuses_what_it_cannot_do(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    muon = arguments("um3", made, f"loop.output_dir={tmp_path}", "optimizer.kind=muon")
    with pytest.raises(UserError, match="zero_stage=2"):
        run_here(monkeypatch, [*muon, "engine.zero_stage=3"])
    with pytest.raises(UserError, match="precision=bf16-mixed"):
        run_here(monkeypatch, [*muon, "engine.precision=bf16-true"])


def test_lamb_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="zero_stage=0"):
        run_here(monkeypatch, arguments("stage1", tmp_path, "optimizer.kind=lamb", "engine.zero_stage=2"))
    run_here(monkeypatch, arguments("stage1", tmp_path / "lamb", "optimizer.kind=lamb", "engine.zero_stage=0"))
    assert losses(tmp_path / "lamb/stage1")[-1] < losses(tmp_path / "lamb/stage1")[0]


def penalty_of_this_ranks_share() -> float:
    """Stage 2's entropy term of this rank's share of four images, with a quantizer sharp enough to tell them apart."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(QLIPModel(tiny_config(quantizer_cfg={"embed_dim": 12, "inv_temperature": 20.0})))
    share = 4 // world_size()
    pixels_BCHW = torch.randn(4, 3, 16, 16)[rank() * share : (rank() + 1) * share]
    return float(autoencoder(pixels_BCHW)[1].detach())


def test_stage2_takes_the_entropy_of_the_mean_code_over_all_ranks(tmp_path: Path) -> None:
    shares = run_on_ranks(penalty_of_this_ranks_share, folder=tmp_path)
    assert sum(shares) / 2 == pytest.approx(penalty_of_this_ranks_share(), rel=1e-5)
