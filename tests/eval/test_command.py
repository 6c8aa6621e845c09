"""What the commands of evaluation share: names of models, and the GPU of a process."""

import shutil
from dataclasses import dataclass

import pytest

from eval.command import model_hash, run_command
from um3.core.errors import UserError


@dataclass
class Settings:
    """No settings."""


def test_a_model_is_named_by_everything_that_its_outputs_depend_on(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match="no weights"):
        model_hash(folder)
    hashes = []
    for name in ("model.safetensors", "chat_template.jinja", "preprocessor_config.json", "merges.txt", "README.md"):
        (folder / name).write_bytes(name.encode())
        hashes.append(model_hash(folder))
    assert len(set(hashes)) == 4 and hashes[-1] == hashes[-2]  # the README changes nothing
    shutil.copytree(folder, tmp_path / "copy")
    assert model_hash(tmp_path / "copy") == hashes[-1] and model_hash("org/model") == "org/model"


def test_every_process_takes_its_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr("eval.command.world_size", lambda: 2)
    monkeypatch.setattr("eval.command.take_gpu", lambda: calls.append("its GPU"))
    run_command(Settings, calls.append, name="x", about="x", arguments=[])
    assert calls == ["its GPU", Settings()]
