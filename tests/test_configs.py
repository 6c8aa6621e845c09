"""Every YAML file under configs/ loads, the paper's carry the paper's numbers, and their models have the right size."""

import re
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from data_mix.batches.schedule import Schedule
from tests.helpers import schemas
from tests.helpers.processes import ROOT
from tokenizer.modeling import QLIPModel
from train.optim import build_optimizer
from train.plan.objective import build_objective
from train.recipes.stage1 import Stage1Objective
from train.recipes.stage2 import Autoencoder
from train.recipes.tokenizer_setup import qlip_config
from train.settings.um3 import UM3Config
from um3.core.config import RENAMED_KEYS, SECTIONS, differences, load_config, to_dict
from um3.core.errors import UserError
from um3.model.language_model import count_parameters

FOLDER = ROOT / "configs"
FULL = ("demo", "um3_llama3_1b", "one_gpu")
"""Experiments with every phase of UM3."""


def load(experiment, phase):
    return load_config(schemas.SECTIONS[phase], path=FOLDER / f"{experiment}.yaml", section=phase)


FREE_NUMBERS = {"seed", "alarm_above", "paper"}
"""Numbers that may be negative."""


def unbounded(hint, name):
    """Names of the numbers in a config's type that have no range."""
    if is_dataclass(hint):
        for key, inner in get_type_hints(hint, include_extras=True).items():
            yield from unbounded(inner, key)
    elif hint in (int, float):
        yield name
    elif not (get_origin(hint) is Annotated and get_args(hint)[0] in (int, float)):
        for inner in get_args(hint):
            yield from unbounded(inner, name)


def config_classes(hint):
    """The config dataclasses within a type."""
    if is_dataclass(hint):
        yield hint
    for part in get_type_hints(hint).values() if is_dataclass(hint) else get_args(hint):
        yield from config_classes(part)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_answered_with_its_new_name(old, new):
    classes = [part for schema in schemas.SCHEMAS for part in config_classes(schema)]
    keys = {part: {field.name for field in fields(part)} for part in classes}
    with pytest.raises(UserError, match=f"unknown key '{old}'; its new name is '{new}'"):
        load_config(next(part for part in classes if keys[part] & {old, new} == {new}), overrides=[f"{old}=1"])


@pytest.mark.parametrize("schema", schemas.SCHEMAS)
def test_every_number_has_a_range(schema):
    assert set(unbounded(schema, "")) <= FREE_NUMBERS, "use a type of um3.core.ranges"


TOKENIZER = {"stage1", "stage2", "codes", "eval"}
LLAVA = {"llava-align", "llava-instruct"}


def sections(experiment):
    """The sections of an experiment's file and of those that it extends."""
    content = yaml.safe_load((FOLDER / f"{experiment}.yaml").read_text())
    base = content.pop("base", None)
    return {*content} | (sections(base.removesuffix(".yaml")) if base else set())


def test_every_section_of_every_experiment_loads():
    assert set(schemas.SECTIONS) == set(SECTIONS)
    found = {path.stem: sections(path.stem) for path in FOLDER.glob("*.yaml")}
    for experiment, names in found.items():
        assert names >= TOKENIZER or names == LLAVA, experiment
        for phase in names:
            load(experiment, phase)
    assert found["demo"] == set(SECTIONS) and all(found[name] >= {"um3-init", "um3", "um3-instruct"} for name in FULL)
    with pytest.raises(UserError, match="no section 'um3'"):
        load("qlip_b16", "um3")


@pytest.mark.parametrize("experiment", FULL)
def test_the_phases_of_an_experiment_fit_each_other(experiment):
    stage1, stage2, um3, evaluation = (load(experiment, phase) for phase in ("stage1", "stage2", "um3", "eval"))
    vocabulary, shape = um3.vocabulary, stage1.model
    assert vocabulary.subtokens * vocabulary.bits_per_subtoken == shape.bits
    image_tokens = (shape.image_size // shape.patch_size) ** 2 * vocabulary.subtokens
    for phase in (um3, load(experiment, "um3-instruct")):
        assert image_tokens + len(["bos", "begin of image", "end of image", "eos"]) < phase.data.seq_len
        assert um3.model.base_model or phase.data.seq_len <= um3.model.max_position_embeddings
    if not um3.model.base_model:
        assert evaluation.language.max_tokens == um3.data.text_seq_len
    assert [source.name for source in stage1.data.sources] == [source.name for source in stage2.data.sources]


def test_the_demo_needs_nothing_from_outside():
    phases = ("stage1", "stage2", "codes", "um3", "um3-instruct")
    stage1, stage2, codes, um3, instruct = (load("demo", phase) for phase in phases)
    sources = [*stage1.data.sources, *stage2.data.sources, *codes.images, *um3.data.texts]
    sources += [*instruct.data.texts, *instruct.data.conversations]
    assert {source.kind for source in sources} <= {"scenes", "digits", "python_docs"}
    assert not any(source.path for source in sources)
    assert not um3.model.base_model and not stage1.text.tokenizer


@pytest.mark.parametrize("lora", ["lora.rank=0", "lora.rank=16"])
def test_one_gpu_asks_for_its_start(lora, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN", str(tmp_path))
    settings = [lora, "visual_tokenizer=nvidia/QLIP-B-16-256"]
    config = load_config(UM3Config, path=FOLDER / "one_gpu.yaml", section="um3", overrides=settings)
    with pytest.raises(UserError, match=rf"no model in '{tmp_path}/um3-init/model'; run `make um3-init` first"):
        config.inputs()


def test_llamagen_has_the_published_recipe():
    config = load("llamagen_xl", "llamagen")
    assert (config.model.size, config.model.subtokens, config.model.prefix_rotation) == ("XL", 2, "zero")
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_steps) == (1e-4, "constant", 0)
    assert (config.loop.batch_size, config.text_encoder.max_tokens, config.clean) == (256, 120, True)
    assert config.loop.batch_size * config.loop.max_steps == 60_000_000
    assert {*config.data.image_weights} <= {source.name for source in load("llamagen_xl", "codes").images}


TABLE_8 = {
    **{"loop.max_steps": 120_000, "optimizer.warmup_steps": 2_000, "optimizer.betas": [0.9, 0.95]},
    **{"optimizer.weight_decay": 0.05, "optimizer.schedule": "cosine", "optimizer.lr": 5e-4},
}
LOSS_1 = {"loss.mse": 1e3, "loss.contrastive": 1.0, "loss.entropy": 1.0, "loss.commitment": 1.0}
SHAPE = dict(image_size=256, patch_size=16, hidden_size=768, num_layers=12, intermediate_size=2048, bits=28)
STAGE_1 = {"optimizer.kind": "lamb", "optimizer.grad_clip": 5.0, "loop.batch_size": 128 * 512}
CRITIC = {"kind": "adamw", "lr": 1e-4, "module_lr": {}}
STAGE_2 = {
    **{"optimizer.kind": "adamw", "optimizer.grad_clip": 1.0, "loop.batch_size": 128 * 128},
    **{"loss.mse": 1.0, "loss.entropy": 1.0, "loss.perceptual": 0.1, "loss.adversarial": 0.1},
    **{f"discriminator_optimizer.{key}": value for key, value in CRITIC.items()},
}
TABLE_9 = TABLE_8 | {
    **{"loop.max_steps": 600_000, "optimizer.weight_decay": 0.1, "optimizer.lr": 1e-4, "optimizer.kind": "adamw"},
    **{"optimizer.grad_clip": 1.0, "loop.batch_size": 512, "loop.micro_batch_size": 8, "data.seq_len": 4096},
    **{"model.base_model": "meta-llama/Llama-3.2-1B", "model.qk_norm": True, "loss.mode": "split", "loss.z_loss": 0.0},
    **{"vocabulary.subtokens": 2, "vocabulary.bits_per_subtoken": 14},
}
LLAVA_1_5 = {
    **{"optimizer.kind": "adamw", "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8, "optimizer.grad_clip": 0.0},
    **{"optimizer.weight_decay": 0.0, "optimizer.schedule": "cosine", "optimizer.final_lr_ratio": 0.0},
    **{"engine.precision": "bf16-true", "engine.activation_checkpointing": True, "data.max_tokens": 2048},
}
ALIGN = {
    **{"loop.max_steps": 2181, "loop.batch_size": 256, "loop.micro_batch_size": 32, "optimizer.lr": 1e-3},
    **{"schedule.warmup_steps": 66, "engine.zero_stage": 2, "data.template": "plain", "data.pad_to_square": False},
    **{"vision_feature_layer": -2, "quantized_features": False, "dtype": "bfloat16"},
}
INSTRUCT = {
    **{"loop.max_steps": 5198, "loop.batch_size": 128, "loop.micro_batch_size": 16, "optimizer.lr": 2e-5},
    **{"schedule.warmup_steps": 156, "engine.zero_stage": 3, "data.template": "v1", "data.pad_to_square": True},
}
EVALUATION = {
    **{"generation.sampling.temperature": 1.0, "generation.sampling.top_p": 0.95, "generation.num_images": 30_000},
    **{"captions.num_images": 5_000, "tokenizer.num_images": 50_000, "fid_features": "inception-2015"},
}


@pytest.mark.parametrize(
    ("experiment", "phase", "table"),
    [
        ("qlip_b16", "stage1", TABLE_8 | STAGE_1 | LOSS_1 | {f"model.{key}": value for key, value in SHAPE.items()}),
        ("qlip_b8", "stage1", TABLE_8),  # the variant that the table is about
        ("qlip_b16", "stage2", TABLE_8 | STAGE_2),
        ("um3_llama3_1b", "um3", TABLE_9),
        ("um3_llama3_1b", "eval", EVALUATION),
        ("llava_qlip_l14_392", "llava-align", LLAVA_1_5 | ALIGN),
        ("llava_qlip_l14_392", "llava-instruct", LLAVA_1_5 | INSTRUCT),
    ],
)
def test_the_papers_tables(experiment, phase, table):
    config = load(experiment, phase)
    assert {key: attrgetter(key)(config) for key in table} == table
    if phase == "stage2":
        assert config.perceptual.backbone and config.perceptual.heads  # LPIPS itself, not the stand-in


def test_the_papers_mix_fills_its_batch():
    config = load("um3_llama3_1b", "um3")
    schedule, batch = Schedule(config.data.mix), config.loop.batch_size
    assert schedule.counts(0, batch_size=batch) == {"text": 480, "i2t": 8, "t2i": 24}
    for step in (10_000, 20_000):
        assert schedule.counts(step, batch_size=batch) == {"text": 384, "i2t": 32, "t2i": 96}
    assert schedule.proportions(9_999)["text"] > 0.75 == schedule.proportions(10_000)["text"]


def meta_qlip(experiment="qlip_b16"):
    """The tokenizer of an experiment's stage 1, without memory."""
    config = load(experiment, "stage1")
    with torch.device("meta"):
        return QLIPModel(qlip_config(config.model, config.text))


def peaks(module, *, config):
    """The peak rate of every trained parameter. Weights of two or more dimensions decay, others do not."""
    names, rates = {parameter: name for name, parameter in module.named_parameters()}, {}
    for group in build_optimizer(module.named_parameters(), config=config).param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["peak_lr"]
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            assert group["weight_decay"] == decay, names[parameter]
    return rates


@pytest.mark.parametrize(
    ("experiment", "tokens", "millions"), [("qlip_b16", 256, 87), ("qlip_b8", 1024, 87), ("qlip_l14", 784, 304)]
)
def test_every_variant_has_the_papers_size(experiment, tokens, millions):
    model = meta_qlip(experiment)
    assert (model.num_patches, model.num_bits) == (tokens, 28)
    bottleneck = ("quant_embed.", "quant_embed_post.")
    encoder = {name: p.numel() for name, p in model.vision_model.named_parameters() if not name.startswith(bottleneck)}
    assert sum(encoder.values()) == pytest.approx(millions * 1e6, rel=0.02)
    assert sum(p.numel() for p in model.vision_decoder.parameters()) == pytest.approx(millions * 1e6, rel=0.04)


@pytest.mark.parametrize(
    ("experiment", "phase", "changed"),
    [
        ("bsqvit", "stage1", ["loss.contrastive: 1.0 -> 0.0"]),
        ("bsqvit", "stage2", []),
        ("bsqvit", "codes", []),
        ("clip_only", "stage1", ["loss.mse: 1000.0 -> 0.0"]),
        ("vqvit", "codes", []),
    ],
)
def test_a_control_differs_from_qlip_in_one_weight(experiment, phase, changed):
    assert differences(to_dict(load("qlip_b16", phase)), to_dict(load(experiment, phase))) == changed


def test_the_vq_baseline_differs_from_bsqvit_in_its_quantizer():
    for phase, keys in {"stage1": ["model.bits", "model.quantizer"], "stage2": ["trainable"]}.items():
        changed = differences(to_dict(load("bsqvit", phase)), to_dict(load("vqvit", phase)))
        assert {line.partition(":")[0] for line in changed} == {"loss.entropy", *keys}
    model = meta_qlip("vqvit")
    assert model.num_bits == 14 and model.vision_model.quantizer.codebook.shape == (16384, 8)
    trainable = load("vqvit", "stage2").trainable
    trained = [name for name, p in Autoencoder(model, trainable=trainable).named_parameters() if p.requires_grad]
    assert trained and not any("quant_embed." in name for name in trained)


def test_the_decoder_alone_is_tuned_on_imagenet():
    config, base = load("qlip_b16_in1k", "stage2"), load("qlip_b16", "stage2")
    changed = differences(to_dict(base), to_dict(config))
    assert {line.partition(":")[0].partition("[")[0] for line in changed} == {"trainable", "data.sources"}
    autoencoder = Autoencoder(meta_qlip(), trainable=config.trainable)
    trained = {name for name, parameter in autoencoder.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("qlip.vision_decoder.") for name in trained)
    assert peaks(autoencoder, config=config.optimizer).keys() == trained


def test_b_16_and_b_8_differ_by_their_patches():
    """768 positions more in encoder and decoder, smaller patches in the first and last layer."""
    finer_grid, smaller_patches = 2 * 768 * 768, -3 * (256 - 64) * (768 + 2048 + 1)
    b16, b8 = (sum(p.numel() for p in meta_qlip(experiment).parameters()) for experiment in ("qlip_b16", "qlip_b8"))
    assert b16 == 239_434_013 and b8 == b16 + finer_grid + smaller_patches == 238_991_069


def test_the_rates_of_stage_1_reach_their_modules():
    objective = Stage1Objective(meta_qlip())
    found = peaks(objective, config=load("qlip_b16", "stage1").optimizer)
    assert len(found) == len(list(objective.parameters()))
    rates = {".".join(name.split(".")[1:3]): rate for name, rate in found.items()}
    assert all(rates[".".join(name.split(".")[1:3])] == rate for name, rate in found.items())
    encoder = ("embeddings", "encoder", "post_layernorm")
    expected = {f"vision_model.{part}": 2e-4 for part in encoder}
    expected |= {f"vision_model.{part}": 5e-4 for part in ("quant_embed", "quant_embed_post")}
    for part, rate in rates.items():
        tower = {"text_model": 2e-5, "vision_decoder": 2e-3}.get(part.split(".")[0], 5e-4)
        assert rate == expected.get(part, tower), part
    assert expected.keys() <= rates.keys()


def test_stage_2_trains_bottleneck_and_decoder_only():
    found = peaks(Autoencoder(meta_qlip()), config=load("qlip_b16", "stage2").optimizer)
    rates = {(re.sub(r"^qlip\.(vision_model\.)?|\..*", "", name), rate) for name, rate in found.items()}
    assert rates == {("quant_embed", 5e-4), ("quant_embed_post", 5e-4), ("vision_decoder", 1e-4)}


def test_um3_has_its_size_and_one_rate():
    config = load("um3_llama3_1b", "um3")
    objective, ids = build_objective(config)
    model = objective.model
    counts = count_parameters(model, ids=ids)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters()) == 1_632_710_656
    assert counts["visual embedding"] == counts["visual head"] == 32_768 * 2048
    assert counts["norms"] == (16 * 2 + 1) * 2048 + 16 * 2 * 64
    # Llama-3.2-1B without its embedding, and the gains of qk-norm.
    assert counts["layers"] + counts["norms"] == 1_235_814_400 - 128_256 * 2048 + 16 * 2 * 64
    assert type(model).__name__ == "Qwen3ForCausalLM" and not model.config.tie_word_embeddings
    found = peaks(objective, config=config.optimizer)
    assert set(found.values()) == {1e-4} and len(found) == len(list(objective.parameters()))
