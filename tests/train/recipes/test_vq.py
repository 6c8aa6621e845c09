"""The VQ baseline through stage 1, stage 2, codes and LlamaGen at a tiny size; resumed bit for bit."""

import pytest
import torch

from downstream.llamagen.pipeline import LlamaGenPipeline
from tests.train.conftest import arguments, check_resumed, encode_scenes, logged, losses, train_apart, train_here
from tokenizer import load
from train.phase import main
from um3.core.errors import UserError

VQ = ("model.quantizer=vq", "model.bits=6", "model.code_size=4", "loss.entropy=0")
FIXED = ("loss.entropy=0", "trainable=[qlip.vision_model.quant_embed_post,qlip.vision_decoder]")


def codebook(folder):
    return load(folder / "model")[0].vision_model.quantizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a VQ tokenizer after both stages, and its codes."""
    folder = tmp_path_factory.mktemp("vq")
    main(arguments("stage1", folder, *VQ))
    main(arguments("stage2", folder, *FIXED))
    encode_scenes(folder, f"visual_tokenizer={folder}/stage2/model")
    return folder


def test_stage_1_trains_the_codebook_and_stage_2_keeps_it(run):
    assert all(perplexity > 1 for perplexity in logged(run / "stage1", "codebook/perplexity"))
    assert logged(run / "stage1", "train/entropy") == [0.0] * 4
    first, second = codebook(run / "stage1"), codebook(run / "stage2")
    assert not first.is_empty and torch.equal(first.codebook, second.codebook)
    pixels = torch.rand(4, 3, 32, 32)
    codes = [load(run / stage / "model")[0].encode(pixels) for stage in ("stage1", "stage2")]
    assert torch.equal(*codes) and 0 <= int(codes[0].min()) <= int(codes[0].max()) < 64


def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    check_resumed(arguments("stage1", run, *VQ), run / "stage1", tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "loop.micro_batch_size=2",
        "engine.zero_stage=0",
        "gradient_norms=true",
        pytest.param("engine.zero_stage=3 optimizer.kind=adamw", marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_the_engine(override, run, tmp_path):
    expected = losses(run / "stage1")
    if "adamw" in override:
        expected = train_here("stage1", run, tmp_path / "adamw", *VQ, "optimizer.kind=adamw")
    assert train_here("stage1", run, tmp_path / "other", *VQ, *override.split()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_a_codebook_together(run, tmp_path):
    train_apart(arguments("stage1", run, *VQ, f"loop.output_dir={tmp_path}", "--processes=2"))
    # The k-means of two ranks starts from other vectors.
    assert losses(tmp_path) == pytest.approx(losses(run / "stage1"), rel=0.05)


def test_it_starts_again_from_a_codebook_and_after_an_identity_bottleneck(run, tmp_path):
    again = [f"model.init_from={run}/stage1/model", "loss.entropy=0"]
    train_here("stage1", run, tmp_path / "again", *again, "loop.max_steps=1", "codebook.decay=0.5")
    old, new = codebook(run / "stage1").codebook, codebook(tmp_path / "again").codebook
    assert not torch.equal(old, new) and torch.cosine_similarity(old, new).mean() > 0.9
    train_here("stage1", run, tmp_path / "identity", *VQ, "bottleneck=identity", "loop.max_steps=1")
    assert codebook(tmp_path / "identity").is_empty


def test_llamagen_and_um3_train_on_its_codes(run, tmp_path):
    main(arguments("llamagen", run))
    pipeline = LlamaGenPipeline.from_pretrained(run / "llamagen/model")
    assert pipeline.generate(["a red circle"], seed=1).arrays.shape == (1, 32, 32, 3)
    sizes = ("vocabulary.subtokens=1", "vocabulary.bits_per_subtoken=6")
    assert len(train_here("um3", run, tmp_path, *sizes, "loop.max_steps=1")) == 1


@pytest.mark.parametrize(
    ("phase", "overrides", "message"),
    [
        ("stage1", ["model.quantizer=vq", "model.bits=28"], r"2\^28 vectors; set bits to 20 or less"),
        ("stage1", [*VQ, "model.group_size=2"], "belong to quantizer bsq"),
        ("stage1", [*VQ, "loss.entropy=1"], r"set loss\.entropy=0"),
        ("stage1", [*VQ, "optimizer.ema_decay=0.9"], r"set optimizer\.ema_decay=0"),
        ("stage1", [*VQ, "engine.precision=bf16-true", "optimizer.kind=adamw"], "precision=bf16-mixed"),
        ("stage1", ["codebook.decay=0.9"], r"model\.quantizer=vq"),
        ("stage2", ["loss.entropy=0"], r"trainable=\[qlip\.vision_model\.quant_embed_post"),
        ("stage2", FIXED[1:], r"set loss\.entropy=0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(phase, overrides, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        train_here(phase, run, tmp_path, *overrides)
