"""The engine section of a config: refused combinations, DeepSpeed's keys, precision, buckets, compiled layers, fused
AdamW."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

from tests.train.conftest import train_here
from train.checkpoint import full_weights
from train.config import OUR_KEYS, EngineConfig, LoopConfig, OptimizerConfig
from train.engine import (
    autocast,
    build_engine,
    check_engine,
    fuse_adamw,
    fuse_layers,
    limit_parameter,
    set_attention,
    start_runtime,
    step_engine,
)
from train.optim import build_optimizer, set_learning_rate
from um3.core.config import load_config
from um3.core.distributed import take_gpu
from um3.core.errors import UserError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")


@pytest.mark.parametrize(
    ("engine", "kind", "remedy"),
    [
        (dict(zero_stage=1), "lamb", "zero_stage=0"),
        (dict(zero_stage=3), "muon", "zero_stage=2"),
        (dict(zero_stage=1, precision="bf16-true"), "muon", "precision=bf16-mixed"),
        (dict(zero_stage=0, precision="bf16-true"), "adamw", "zero_stage=1"),
        (dict(zero_stage=3, compile=True), "adamw", "compile=false"),
        (dict(zero_stage=0, offload_optimizer=True), "adamw", "zero_stage=1"),
        (dict(zero_stage=0, deepspeed={"zero_optimization": {}}), "adamw", "zero_stage=1"),
        (dict(zero_stage=1, offload_optimizer=True), "muon", "optimizer.kind=adamw"),
        pytest.param(dict(zero_stage=1, offload_optimizer=True), "adamw", "offload_optimizer=false", marks=no_gpu),
    ],
)
def test_what_cannot_run_together_is_refused_with_its_remedy(engine, kind, remedy):
    with pytest.raises(UserError, match=remedy):
        check_engine(EngineConfig(**engine), optimizer=OptimizerConfig(kind=kind))


@pytest.mark.parametrize(
    ("passed", "names"),
    [
        ({"train_batch_size": 8}, "loop.batch_size"),
        ({"gradient_accumulation_steps": 2}, "loop.micro_batch_size"),
        ({"fp16": {"enabled": True}}, "engine.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.kind"),
        ({"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ({"zero_optimization": {"reduce_bucket_size": 1}}, "engine.bucket_elements"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; it takes zero_optimization"),
        ({"zero_optimization": None}, "must be a dict"),
        ({"communication_data_type": 16}, "must be a str"),
    ],
)
def test_keys_of_deepspeed_that_are_ours_or_unknown_are_one_line(passed, names):
    with pytest.raises(UserError, match=rf"^[^\n]*{names}[^\n]*$"):
        load_config(EngineConfig, overrides=[f"deepspeed={json.dumps(passed)}"])


def test_every_key_that_we_give_deepspeed_is_ours(monkeypatch):
    handed = {}
    monkeypatch.setattr("deepspeed.initialize", lambda **options: handed.update(options["config"]) or 1 / 0)
    for settings in (dict(precision="bf16-mixed"), dict(precision="bf16-true", offload_optimizer=True)):
        monkeypatch.setattr("train.engine.check_engine", lambda *_, **__: None)
        engine = EngineConfig(zero_stage=2, **settings)
        with pytest.raises(ZeroDivisionError):
            build_engine(nn.Linear(8, 4), optimizer=OptimizerConfig(), engine=engine, loop=LoopConfig(batch_size=1))
        zero = {f"zero_optimization.{key}" for key in handed["zero_optimization"]}
        assert (handed.keys() | zero) - {"zero_optimization"} <= OUR_KEYS.keys()


def engine_with(passed):
    """An engine with the keys of DeepSpeed that a command line passes on."""
    config = load_config(EngineConfig, overrides=["zero_stage=2", "precision=fp32", f"deepspeed={json.dumps(passed)}"])
    start_runtime(LoopConfig(num_threads=1))
    return build_engine(nn.Linear(8, 4), optimizer=OptimizerConfig(), engine=config, loop=LoopConfig(batch_size=1))


def test_deepspeed_gets_the_keys_that_are_not_ours():
    engine = engine_with({
        "zero_optimization": {"overlap_comm": True, "allgather_bucket_size": 1000}, "communication_data_type": "bf16",
        "wall_clock_breakdown": True, "comms_logger": {"enabled": False}, "flops_profiler": {"profile_step": 7},
    })  # fmt: skip
    zero = engine._config.zero_config
    assert (zero.stage, zero.overlap_comm, zero.allgather_bucket_size) == (2, True, 1000)
    assert engine.communication_data_type == torch.bfloat16
    assert engine.wall_clock_breakdown() and engine.flops_profiler_profile_step() == 7


@pytest.mark.parametrize(
    ("passed", "reason"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com Extra inputs are not permitted"),
        ({"zero_optimization": {"overlap_comm": "often"}}, "overlap_comm Input should be a valid boolean"),
        ({"communication_data_type": "int8"}, "Got: int8"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(passed, reason):
    with pytest.raises(UserError, match=rf"^DeepSpeed refuses engine\.deepspeed: [^\n]*{reason}[^\n]*$"):
        engine_with(passed)


@no_gpu
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_flash_and_flex_attention_without_a_gpu_are_one_line(attention):
    with pytest.raises(UserError, match=r"needs a GPU.*; set engine\.attention=sdpa"):
        set_attention(nn.Module(), EngineConfig(attention=attention))


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_deepspeed_leaves_autocast_on(zero_stage, monkeypatch):
    """DeepSpeed switches off an autocast that it did not configure. It asks for CUDA's; here it gets the CPU's."""
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device))
    config = EngineConfig(zero_stage=zero_stage, precision="bf16-mixed")
    start_runtime(LoopConfig(num_threads=1))
    engine = build_engine(nn.Linear(8, 4), optimizer=OptimizerConfig(), engine=config, loop=LoopConfig(batch_size=1))
    with autocast(config):
        outputs = engine(torch.ones(1, 8))
    assert outputs.dtype == torch.bfloat16
    # Gradients stay in float32.
    assert not any(hasattr(parameter, "comm_dtype") for parameter in engine.module.parameters())


def test_every_process_uses_its_own_gpu(monkeypatch):
    taken = []
    for name, value in {"is_available": True, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for place in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", place)
        take_gpu()
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="set NPROC=2"):
        take_gpu()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_compiled_layers_have_the_same_losses(zero_stage, made, tmp_path):
    """With several sequence lengths and activation checkpointing."""
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    options = [f"engine.zero_stage={zero_stage}", "model.num_layers=2", "engine.activation_checkpointing=true"]
    expected, before = train_here("um3", made, tmp_path / "plain", *options), frames["ok"]
    compiled = train_here("um3", made, tmp_path / "compiled", *options, "engine.compile=true")
    assert frames["ok"] > before and compiled == pytest.approx(expected, rel=1e-4)


def test_fused_adamw_takes_the_same_steps():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    fused = copy.deepcopy(plain)
    inputs_BD = torch.randn(32, 8)
    for model in (plain, fused):
        optimizer = build_optimizer(model.named_parameters(), config=OptimizerConfig(lr=1e-2))
        if model is fused:
            fuse_adamw(optimizer)
        set_learning_rate(optimizer, factor=1.0)
        for _ in range(5):
            model(inputs_BD).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(group["fused"] == (model is fused or None) for group in optimizer.param_groups)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_a_stock_language_model_no_layer_is_replaced():
    assert fuse_layers(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16-true"), (3, "fp32")])
def test_a_limited_parameter_stays_at_its_limit(zero_stage, precision):
    """ZeRO would copy its float32 master over a parameter that alone is clamped."""
    start_runtime(LoopConfig(num_threads=1))
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.9)
    options = dict(engine=EngineConfig(zero_stage=zero_stage, precision=precision), loop=LoopConfig(batch_size=1))
    engine = build_engine(model, optimizer=OptimizerConfig(lr=0.2, weight_decay=0.0), **options)
    set_learning_rate(engine.optimizer, factor=1.0)
    for _ in range(3):
        engine.backward(-engine(torch.ones(1, 2, dtype=model.weight.dtype)).sum())
        step_engine(engine)
        limit_parameter(engine, model.weight, maximum=1.0)
        assert full_weights(engine)["weight"].tolist() == [[1.0, 1.0]]
