"""What the engine section of a config does: refusals, precision, buckets, compiled layers, fused AdamW."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import arguments, losses, run_here
from train.config import EngineConfig, LoopConfig, OptimizerConfig
from train.engine import (
    _take_gpu,
    autocast,
    build_engine,
    check_engine,
    fuse_adamw,
    fuse_layers,
    precision_of,
    start_runtime,
)
from train.optim import build_optimizer, set_learning_rate
from um3.core.errors import UserError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.mark.parametrize(
    ("engine", "kind", "remedy"),
    [
        (dict(zero_stage=1), "lamb", "zero_stage=0"),
        (dict(zero_stage=3), "muon", "zero_stage=2"),
        (dict(zero_stage=1, precision="bf16-true"), "muon", "precision=bf16-mixed"),
        (dict(zero_stage=0, precision="bf16-true"), "adamw", "zero_stage=1"),
        (dict(zero_stage=3, compile=True), "adamw", "compile=false"),
        (dict(zero_stage=0, offload_optimizer=True), "adamw", "ZeRO 1 to 3"),
        (dict(zero_stage=1, offload_optimizer=True), "muon", "AdamW"),
        pytest.param(dict(zero_stage=1, offload_optimizer=True), "adamw", "no GPU here", marks=no_gpu),
    ],
)
def test_what_cannot_run_together_is_refused_with_its_remedy(engine: dict[str, Any], kind: Any, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as found:
        check_engine(EngineConfig(**engine), optimizer=OptimizerConfig(kind=kind))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_takes_adamw(zero_stage: Any) -> None:
    check_engine(EngineConfig(zero_stage=zero_stage), optimizer=OptimizerConfig())
    check_engine(EngineConfig(zero_stage=zero_stage, precision="bf16-mixed"), optimizer=OptimizerConfig())


@no_gpu
def test_offloading_without_a_gpu_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [f"loop.output_dir={tmp_path}/um3", "engine.zero_stage=2", "engine.offload_optimizer=true"]
    with pytest.raises(UserError, match="no GPU here; leave it off"):
        run_here(monkeypatch, arguments("um3", made, *options))


@no_gpu
def test_flash_attention_without_a_gpu_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [f"loop.output_dir={tmp_path}/um3", "engine.attention=flash_attention_2", "data.packing=documents"]
    with pytest.raises(UserError, match=r"needs a GPU and bf16 products; set engine\.attention=sdpa"):
        run_here(monkeypatch, arguments("um3", made, *options))


def test_precision_by_itself_is_the_machines() -> None:
    assert precision_of(EngineConfig()) == ("bf16-mixed" if torch.cuda.is_available() else "fp32")
    assert precision_of(EngineConfig(precision="bf16-true")) == "bf16"


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_leaves_autocast_on(zero_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not know of it switches off, where torch tells of CUDA's autocast: here it tells of the CPU's."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))
    config = EngineConfig(zero_stage=zero_stage, precision="bf16-mixed")
    start_runtime(LoopConfig(num_threads=1))
    engine = build_engine(nn.Linear(8, 4), optimizer=OptimizerConfig(), engine=config, micro_batch_size=1)
    with autocast(config):
        outputs = engine(torch.ones(1, 8))
    assert outputs.dtype == torch.bfloat16
    assert not any(hasattr(each, "comm_dtype") for each in engine.module.parameters())  # gradients stay in float32


def test_every_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    for name, value in {"is_available": True, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for place in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", place)
        _take_gpu()
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="this machine has 2; set NPROC=2"):
        _take_gpu()


def test_buckets_below_one_element_are_refused() -> None:
    with pytest.raises(ValueError, match="bucket_elements is 0"):
        EngineConfig(bucket_elements=0)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_losses_do_not_depend_on_the_bucket(
    zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller than the largest parameter, which then goes alone, and with a remainder."""
    for name, size in (("whole", 500_000_000), ("parts", 3_001)):
        options = [f"loop.output_dir={tmp_path}/{name}", f"engine.zero_stage={zero_stage}", "loop.micro_batch_size=4"]
        run_here(monkeypatch, arguments("um3", made, *options, f"engine.bucket_elements={size}"))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_compiled_layers_learn_the_same(
    zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows of several lengths, and layers computed again in the backward pass."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["frames"]
    options = [f"engine.zero_stage={zero_stage}", "model.num_layers=2", "engine.activation_checkpointing=true"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/plain", *options))
    before = counted["ok"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/fast", *options, "engine.compile=true"))
    assert counted["ok"] > before
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_fused_adamw_takes_the_same_steps() -> None:
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


def test_without_a_stock_language_model_no_layer_is_replaced() -> None:
    assert fuse_layers(nn.Linear(2, 2)) == []
