"""A checkpoint in several files, without an engine of DeepSpeed's."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint
from um3.core.files import sha256_of


@pytest.fixture
def engine():
    """Three weights of 4 KiB, with their state in AdamW."""
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(1024)) for name in "abc"})
    optimizer = torch.optim.AdamW([{"params": list(module.values()), "ema_decay": 0.0}])
    for parameter in module.values():
        parameter.grad = torch.randn(1024)
    optimizer.step()
    never = lambda: False  # noqa: E731
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization=never, bfloat16_enabled=never)


def test_every_file_has_its_tensors_and_its_hash(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 10_000)  # exceeded by three tensors
    path = checkpoint.save_checkpoint(tmp_path, step=7, engines={"model": engine}, state={"seen": 1})
    meta = checkpoint.read_meta(path)
    assert list(meta["files"]) == [f"model-{number:05d}.safetensors" for number in range(3)]
    assert {name: sha256_of(path / name) for name in meta["files"]} == meta["files"]
    tensors = {key: tensor for name in meta["files"] for key, tensor in load_file(path / name).items()}
    assert len(tensors) == 9
    for name, parameter in engine.module.items():
        assert torch.equal(tensors[f"{name}/param"], parameter)
        assert torch.equal(tensors[f"{name}/exp_avg"], engine.optimizer.state[parameter]["exp_avg"])
    assert checkpoint.find_checkpoint(tmp_path) == (path, meta)


def test_a_failed_write_leaves_nothing(engine, tmp_path, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_checkpoint(tmp_path, step=7, engines={"model": engine}, state={})
    assert not list(tmp_path.iterdir())
