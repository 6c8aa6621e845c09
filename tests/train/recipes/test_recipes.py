"""The three recipes end to end at the smallest size, through the real engine and the real files."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.processes import run_on_ranks
from tests.tokenizer.conftest import tiny_config
from tests.tokenizer.test_pretrained import eva_file
from tests.train.conftest import arguments, logged, losses, train_apart, train_here
from tokenizer import load
from tokenizer.modeling import QLIPModel
from train.recipes.stage2 import Autoencoder
from um3.core.distributed import rank, world_size
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.metrics import read_metrics
from um3.inference.pipeline import UM3Pipeline


def done(folder):
    return read_json(folder / "done.json")


def changed_tensors(before, after, *, parts=9):
    """Names of the tensors that differ between two QLIP folders, up to `parts` parts of each."""
    old, new = (load(folder)[0].state_dict() for folder in (before, after))
    return {".".join(name.split(".")[:parts]) for name in old if not torch.equal(old[name], new[name])}


def test_stage1_writes_a_tokenizer_and_its_record(made):
    model, processor = load(made / "stage1/model")
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert processor.text(["a red circle"])["input_ids"].shape[0] == 1
    record = done(made / "stage1")
    assert record["fingerprint"] == model.fingerprint() and record["steps"] == 4
    row = read_metrics(made / "stage1/metrics.jsonl")[-1]
    weighted = sum(weight * row[f"train/{name}"] for name, weight in record["config"]["loss"].items())
    assert row["train/loss"] == pytest.approx(weighted, rel=1e-5)


def test_stage2_trains_bottleneck_and_decoder_only(made):
    changed = changed_tensors(made / "stage1/model", made / "stage2/model")
    assert changed and all(name.startswith(("vision_model.quant_embed", "vision_decoder.")) for name in changed)
    adversarial = logged(made / "stage2", "train/adversarial")
    assert adversarial[0] is None and adversarial[1] is not None
    assert done(made / "stage2")["perceptual"] == "random_features"


def test_bf16_weights_leave_what_is_frozen_as_it_was(made, tmp_path):
    train_here("stage2", made, tmp_path, "optimizer.kind=adamw", "engine.precision=bf16-true", "engine.zero_stage=1")
    changed = changed_tensors(made / "stage1/model", tmp_path / "model")
    assert changed and all(name.startswith(("vision_model.quant_embed", "vision_decoder.")) for name in changed)


def test_um3_writes_a_stock_checkpoint_that_samples(made):
    stock = AutoModelForCausalLM.from_pretrained(made / "um3/model")
    assert type(stock).__module__.startswith("transformers.")
    pipeline = UM3Pipeline.from_pretrained(made / "um3/model")
    assert pipeline.generate(["a red circle"], seed=1).arrays.shape == (1, 32, 32, 3)
    trained = load_file(made / "um3/checkpoints/step-00000004/model-00000.safetensors")
    head_VD, bits_LD = (trained[f"{name}/param"] for name in ("model.lm_head.weight", "bits.output_LD"))
    last_D = head_VD[-1] + bits_LD[6:].sum(0)  # the last entry: every bit of the second subtoken is 1
    assert bits_LD.any() and torch.equal(stock.lm_head.weight[0], head_VD[0])
    torch.testing.assert_close(stock.lm_head.weight[-1], last_D)
    row = read_metrics(made / "um3/metrics.jsonl")[-1]
    assert row["data/rows_text"] + row["data/rows_i2t"] + row["data/rows_t2i"] == 8


def test_stage1_starts_from_an_encoder_file(made, tmp_path):
    source, _ = load(made / "stage1/model")
    options = [f"model.encoder_weights={eva_file(source, tmp_path / 'eva.pt')}", "optimizer.lr=1e-9"]
    train_here("stage1", tmp_path, tmp_path / "run", *options, "loop.seed=5", "loop.max_steps=1")
    model, _ = load(tmp_path / "run/model")
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.vision_features(pixels), source.vision_features(pixels))
    assert not torch.allclose(model.encode(pixels).float(), source.encode(pixels).float())  # the bottleneck is new
    with pytest.raises(UserError, match=r"unset model\.encoder_weights"):
        train_here("stage1", tmp_path, tmp_path / "both", *options, f"model.init_from={made}/stage1/model")


@pytest.mark.parametrize(
    "override", ["loop.micro_batch_size=2", pytest.param("engine.zero_stage=3", marks=pytest.mark.slow)]
)
def test_stage2_losses_do_not_depend_on_the_engine(override, made, tmp_path):
    # The entropy of the mean code is the only term that is not a mean over images.
    options = ["loss.entropy=0", "loss.r1=0.1", "optimizer.kind=adamw"]
    train_here("stage2", made, tmp_path / "plain", *options)
    train_here("stage2", made, tmp_path / "other", *options, override)
    for name in ("train/loss", "train/mse", "train/perceptual", "train/discriminator", "train/r1", "optim/grad_norm"):
        assert logged(tmp_path / "other", name) == pytest.approx(logged(tmp_path / "plain", name), rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_residual_discriminator_with_its_penalty(zero_stage, made, tmp_path):
    kind = ["discriminator.kind=residual", "loss.adversarial_kind=non_saturating", f"engine.zero_stage={zero_stage}"]
    for name, r1 in (("free", 0), ("penalised", 1000)):
        train_here("stage2", made, tmp_path / name, *kind, f"loss.r1={r1}", "discriminator_optimizer.lr=1e-2")
    assert logged(tmp_path / "free", "train/r1") == [None] * 4
    penalty = logged(tmp_path / "penalised", "train/r1")
    assert penalty[-1] < 0.75 * penalty[0]
    for row in read_metrics(tmp_path / "penalised/metrics.jsonl"):
        terms = [value for name, value in row.items() if name.startswith("weighted/")]
        assert row["train/loss"] == pytest.approx(sum(terms), rel=1e-5) and len(terms) >= 3


def test_recipe_2_trains_towers_then_quantizer_then_decoder(tmp_path, made):
    towers, quantizer, decoder = (tmp_path / name for name in ("towers", "quantizer", "decoder"))
    train_here("stage1", tmp_path, towers, f"model.init_from={made}/stage1/model", "bottleneck=identity")
    parts = changed_tensors(made / "stage1/model", towers / "model", parts=2)
    assert {"vision_model.encoder", "vision_decoder.encoder", "text_model.encoder"} <= parts
    assert not {"vision_model.quant_embed", "vision_model.quant_embed_post"} & parts
    row = read_metrics(towers / "metrics.jsonl")[-1]
    assert row["train/entropy"] == row["train/commitment"] == 0 and row["train/mse"] > 0

    options = [f"model.init_from={towers}/model", "trainable=[qlip.vision_model.quant_embed]", "loss.contrastive=0"]
    train_here("stage1", tmp_path, quantizer, *options)
    parts = changed_tensors(towers / "model", quantizer / "model", parts=2)
    assert parts == {"vision_model.quant_embed", "vision_model.quant_embed_post"}

    train_here("stage2", tmp_path, decoder, f"init_from={quantizer}/model", "trainable=[qlip.vision_decoder]")
    changed = changed_tensors(quantizer / "model", decoder / "model")
    assert changed and all(name.startswith("vision_decoder.") for name in changed)


DEPTH = "vocabulary.prediction=depth; vocabulary.depth_layers=2"
VALIDATION, NO_TEXT = "text_validation.every_steps=1", "data.mix.start=[0,1,1]; data.mix.end=[0,1,1]"


@pytest.mark.parametrize(
    ("phase", "overrides", "message"),
    [
        ("stage2", "init_from=/nowhere", "make stage1"),
        ("um3", "visual_tokenizer=/nowhere", "make stage2"),
        ("um3", "data.codes=/nowhere", "make codes"),
        ("stage1", "trainable=[qlip.vision_tower]", "starts with 'qlip.vision_tower'"),
        ("stage2", "trainable=[qlip.vision_model.encoder]", "cannot train 'qlip.vision_model.encoder'"),
        ("stage2", "discriminator.num_layers=5", "does not fit images of 32 pixels"),
        ("stage1", "model.patch_size=7", "image_size 32 is not a multiple of patch_size 7"),
        ("stage1", "model.decoder_overlap=17", "decoder_overlap 17 is larger than patch_size"),
        ("stage1", "text.num_heads=5", "hidden_size 32 is not a multiple of num_heads 5"),
        ("stage1", "model.num_heads=16", "hidden_size / num_heads = 2 is not a multiple of 4"),
        ("stage1", "text.tokenizer=/nowhere", "text tokenizer .*nowhere"),
        ("stage1", "data.sources=[]", "data.sources has 0 values"),
        ("stage2", "discriminator_optimizer.ema_decay=0.9", r"discriminator_optimizer\.ema_decay"),
        ("stage1", "validation.every_steps=15; loop.log_every_steps=10", r"validation\.every_steps=15"),
        ("um3", f"{VALIDATION}5; loop.log_every_steps=10", r"every_steps=15 .* loop\.log_every_steps=10"),
        ("um3", f"{VALIDATION}; text_validation.num_sequences=0", "num_sequences is 0"),
        ("um3", f"{VALIDATION}; text_validation.texts=[]; data.texts=[]; {NO_TEXT}", "0 text sources"),
        ("um3", f"{VALIDATION}; data.texts=[{{name: prose, kind: python_docs, val_fraction: 0}}]", "val"),
        ("um3", f"{DEPTH}; vocabulary.subtokens=1; vocabulary.bits_per_subtoken=12", "prediction=depth"),
        ("llamagen", "visual_tokenizer={made}/stage1/model", "fingerprint"),
        ("llamagen", "data.image_weights={photos: 1}", "photos"),
        ("llamagen", "model.subtokens=5", "12 bits"),
        ("llamagen", "model.num_heads=3", "model.hidden_size=32 is not a multiple of 4 x model.num_heads=3"),
        ("llamagen", "text_encoder={kind: t5, name: /nowhere}", "T5 text encoder"),
    ],
)
def test_impossible_settings_are_refused(phase, overrides, message, made, tmp_path):
    with pytest.raises(UserError, match=message):
        train_here(phase, made, tmp_path, *overrides.replace("{made}", str(made)).split("; "))


def test_gradient_norms_of_the_two_losses_are_logged(made, tmp_path):
    options = ["gradient_norms=true", "engine.activation_checkpointing=true", "loop.log_every_steps=2"]
    train_here("stage1", tmp_path, tmp_path, *options)
    assert logged(tmp_path, "step") == [1, 2, 4]
    assert all(norm > 0 for name in ("contrastive", "mse") for norm in logged(tmp_path, f"gradients/{name}"))
    assert losses(tmp_path)[1:] == pytest.approx(losses(made / "stage1")[1::2], rel=1e-5)


def test_stage2_terms_of_weight_0_build_no_networks(made, tmp_path):
    train_here("stage2", made, tmp_path, "loss.perceptual=0", "loss.adversarial=0", "perceptual.backbone=nowhere.pth")
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert {name for name in row if name.startswith("train/")} == {"train/loss", "train/mse", "train/entropy"}
    assert not list((tmp_path / "checkpoints").rglob("discriminator*")) and done(tmp_path)["perceptual"] == "none"


@pytest.mark.parametrize("zero_stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_the_saved_weights_are_the_moving_average(zero_stage, made, tmp_path):
    options = ["optimizer.kind=adamw", "optimizer.ema_decay=0.75", "loop.keep_checkpoints=9"]
    options += ["loop.save_every_steps=1", "loop.micro_batch_size=4", f"engine.zero_stage={zero_stage}"]
    train_here("stage2", made, tmp_path, *options)
    average, before = {}, load(made / "stage1/model")[0].state_dict()
    for step in range(1, 5):
        saved = load_file(tmp_path / f"checkpoints/step-{step:08d}/model-00000.safetensors")
        weights = {key.split("/")[0].removeprefix("qlip."): saved[key] for key in saved if key.endswith("/param")}
        for name, value in weights.items():
            average[name] = 0.75 * average.get(name, before[name]) + 0.25 * value
    model, bias = load(tmp_path / "model")[0].state_dict(), "vision_decoder.conv_out.bias"
    assert len(average) > 10 and not torch.equal(model[bias], weights[bias])
    for name, value in average.items():
        torch.testing.assert_close(model[name], value, rtol=1e-5, atol=1e-7)


# A bucket smaller than the largest parameter, which is then reduced alone, and with a remainder.
SMALL_BUCKET = "loop.micro_batch_size=4 engine.bucket_elements=3001"
SLOW_ENGINES = ["engine.zero_stage=0", "engine.zero_stage=3", "engine.activation_checkpointing=true"]
SLOW_ENGINES += [f"engine.zero_stage={stage} {SMALL_BUCKET}" for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    "overrides",
    [
        *("loop.micro_batch_size=2", "engine.zero_stage=2"),
        *(pytest.param(settings, marks=pytest.mark.slow) for settings in SLOW_ENGINES),
    ],
)
def test_um3_losses_do_not_depend_on_the_engine(overrides, made, tmp_path):
    assert train_here("um3", made, tmp_path, *overrides.split()) == pytest.approx(losses(made / "um3"), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "phase", ["um3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stage1", "stage2"))]
)
def test_low_precision_follows_float32(phase, precision, made, tmp_path):
    options = ["optimizer.kind=adamw", "engine.zero_stage=1"] + ["loss.r1=0.1"] * (phase == "stage2")
    expected = losses(made / "um3") if phase == "um3" else train_here(phase, made, tmp_path / "plain", *options)
    options += [f"engine.precision={precision}", "loop.micro_batch_size=4"]
    low = train_here(phase, made, tmp_path / "low", *options)
    assert low == pytest.approx(expected, rel=0.02) and low != expected


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2", "um3"])
def test_two_processes_train_like_one(phase, made, tmp_path):
    train_apart(arguments(phase, made, f"loop.output_dir={tmp_path}", "--processes=2"))
    assert done(tmp_path)["processes"] == 2
    assert losses(tmp_path)[0] == pytest.approx(losses(made / phase)[0], rel=1e-4)
    assert losses(tmp_path) == pytest.approx(losses(made / phase), rel=5e-3)


@pytest.mark.slow
def test_muon_takes_the_same_steps_under_zero(made, tmp_path):
    options = ["optimizer.kind=muon", "model.num_layers=3"]
    expected = train_here("um3", made, tmp_path / "whole", *options, "engine.zero_stage=0")
    for zero_stage in (1, 2):
        folder = tmp_path / str(zero_stage)
        command = arguments("um3", made, f"loop.output_dir={folder}", *options, f"engine.zero_stage={zero_stage}")
        train_apart(command, processes=2)
        assert losses(folder) == pytest.approx(expected, rel=1e-4)
    adamw = train_here("um3", made, tmp_path / "adamw", "model.num_layers=3")
    assert adamw[-1] != pytest.approx(expected[-1], rel=1e-4)


def test_lamb_trains(tmp_path):
    lamb = train_here("stage1", tmp_path, tmp_path, "optimizer.kind=lamb", "engine.zero_stage=0")
    assert lamb[-1] < lamb[0]


def penalty_of_this_ranks_share():
    """Stage 2's entropy term of this rank's share of four images, with a quantizer sharp enough to tell them apart."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(QLIPModel(tiny_config(quantizer_cfg={"embed_dim": 12, "inv_temperature": 20.0})))
    share = 4 // world_size()
    pixels_BCHW = torch.randn(4, 3, 16, 16)[rank() * share : (rank() + 1) * share]
    return float(autoencoder(pixels_BCHW)[1].detach())


@pytest.mark.slow
def test_stage2_takes_the_entropy_of_the_mean_code_over_all_ranks(tmp_path):
    shares = run_on_ranks(penalty_of_this_ranks_share, folder=tmp_path)
    assert sum(shares) / 2 == pytest.approx(penalty_of_this_ranks_share(), rel=1e-5)
