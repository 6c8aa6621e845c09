"""Shared fixtures: a saved tiny UM3 with an untrained visual tokenizer, and the pipeline over it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_um3
from um3.inference.pipeline import UM3Pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved UM3 with random weights, whose images have 4 patches of 28 bits."""
    folder = tmp_path_factory.mktemp("run")
    make_qlip(folder / "qlip", image_size=16, patch_size=8, bits=28)
    return save_um3(folder, qlip_folder=folder / "qlip", scale=10.0)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of `model_folder` that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def qlip_folder(model_folder: Path) -> Path:
    """The untrained QLIP of `model_folder`."""
    return model_folder.parent / "qlip"


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> UM3Pipeline:
    """The pipeline over `model_folder`."""
    return UM3Pipeline.from_pretrained(model_folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image file of 40 x 30 pixels."""
    path = tmp_path / "Holiday photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def roomy(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> UM3Pipeline:
    """The pipeline with a longer context, for prompts of many bytes."""
    monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", 512)
    return pipeline
