"""`engine.precision=auto` on a CPU with AMX for bf16.

Only torch's query of the processor is replaced. The bf16 products are real ones of this CPU, which may be slow.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.survive import outcome
from tests.train.conftest import arguments, losses, train_here
from tests.train.test_resume import kill_and_resume
from train.config import EngineConfig
from train.engine import precision_of
from train.run_folder import read_record
from um3.core.distributed import bf16_speedup

AUTO = "engine.precision=auto"


PHASES = ["um3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stage1", "stage2"))]


@pytest.mark.parametrize("phase", PHASES)
def test_a_cpu_with_amx_trains_in_bf16_and_resumes_to_the_bit(phase, made, tmp_path, amx, monkeypatch, capfd):
    mixed = train_here(phase, made, tmp_path / "whole", AUTO)
    assert "precision: bf16-mixed (engine.precision=auto)" in capfd.readouterr().err
    kill_and_resume(arguments(phase, made, f"loop.output_dir={tmp_path}/killed", AUTO), 2, monkeypatch)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert read_record(tmp_path / "whole/done.json")["precision"] == "bf16-mixed"
    saved = load_file(tmp_path / "whole/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    exact = losses(made / phase)
    assert mixed == pytest.approx(exact, rel=0.02) and mixed != pytest.approx(exact, rel=1e-6)
    assert read_record(made / phase / "done.json")["precision"] == "fp32"


def test_a_run_moves_between_precisions(made, tmp_path, monkeypatch, amx):
    """As between a machine with AMX and one without: the same run, in the other precision."""
    command = arguments("um3", made, f"loop.output_dir={tmp_path}", "engine.precision=fp32")
    kill_and_resume(command, 2, monkeypatch, AUTO)
    moved, whole = losses(tmp_path), losses(made / "um3")
    assert moved[:2] == whole[:2] and moved[2:] == pytest.approx(whole[2:], rel=0.02)
    assert read_record(tmp_path / "done.json")["precision"] == "bf16-mixed"


def test_auto_is_what_pays_on_the_device(amx, monkeypatch):
    auto, cpu, gpu = EngineConfig(), torch.device("cpu"), torch.device("cuda", 0)
    assert precision_of(auto, on=cpu) == precision_of(auto, on=gpu) == "bf16-mixed"
    assert precision_of(EngineConfig(precision="fp32"), on=cpu) == "fp32"
    assert precision_of(EngineConfig(precision="bf16-true"), on=cpu) == "bf16-true"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_tile": True})
    assert precision_of(auto, on=cpu) == "fp32" and precision_of(auto, on=gpu) == "bf16-mixed"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.8
    assert precision_of(auto, on=cpu) == "fp32"


@pytest.mark.parametrize("ratio, says", [(0.55, True), (3.9, False)])
def test_a_run_says_that_bf16_is_slow_on_its_cpu(ratio, says, made, tmp_path, monkeypatch, capfd):
    assert bf16_speedup() > 0
    monkeypatch.setattr("train.loop.bf16_speedup", lambda: ratio)
    train_here("um3", made, tmp_path, "engine.precision=bf16-mixed", "loop.max_steps=1")
    assert ("0.55 times as fast in it as in fp32; set engine.precision=fp32" in capfd.readouterr().err) == says
