"""Shared fixtures: a saved tiny UM3 with an untrained visual tokenizer, and the pipeline over it."""

from pathlib import Path

import pytest

from tests.helpers.tiny_um3 import make_model, save_qlip
from um3.inference.pipeline import UM3Pipeline
from um3.model.language_model import save_model
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer

TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("square", "disk")] * 3


@pytest.fixture(scope="session")
def qlip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained QLIP with 4 patches of 28 bits."""
    folder = tmp_path_factory.mktemp("qlip")
    save_qlip(folder, image_size=16, patch_size=8)
    return folder


@pytest.fixture(scope="session")
def model_folder(qlip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved UM3 with random weights."""
    text_tokenizer = train_text_tokenizer(TEXTS, vocab_size=280)
    ids = make_vocabulary(text_tokenizer, subtokens=4, bits_per_subtoken=7, num_patches=4)
    folder = tmp_path_factory.mktemp("run") / "model"
    model = make_model(ids, scale=10.0)
    save_model(folder, model=model, text_tokenizer=text_tokenizer, ids=ids, qlip_folder=qlip_folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> UM3Pipeline:
    """The pipeline over `model_folder`."""
    return UM3Pipeline.from_pretrained(model_folder)
