"""On a GPU every phase computes the losses of a CPU, and resumes."""

import shutil

import pytest
import torch

from tests.train.conftest import arguments, losses, train_apart
from um3.core.files import read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.parametrize("phase", ["stage1", "stage2", "um3"]),
]


def train(phase, made, folder, *options):
    """The losses of a run in `folder`, with AdamW because Muon multiplies in bf16 on a GPU."""
    train_apart(arguments(phase, made, f"loop.output_dir={folder}", "optimizer.kind=adamw", *options))
    return losses(folder)


def test_a_gpu_computes_the_losses_of_a_cpu(phase, made, tmp_path, monkeypatch):
    on_gpu = train(phase, made, tmp_path / "gpu")
    low = train(phase, made, tmp_path / "low", "engine.precision=auto")
    assert read_json(tmp_path / "low/done.json")["peak_gpu_memory_gib"] > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = train(phase, made, tmp_path / "cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)  # TF32 in convolutions
    assert low == pytest.approx(on_cpu, rel=0.02)
    assert low != pytest.approx(on_gpu, rel=1e-6)  # bf16 products by default


def test_a_run_resumes_within_rounding(phase, made, tmp_path):
    whole = train(phase, made, tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-00000004")
    (tmp_path / "done.json").unlink()
    assert train(phase, made, tmp_path) == pytest.approx(whole, rel=1e-3)
