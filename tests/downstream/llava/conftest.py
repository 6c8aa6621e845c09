"""A QLIP, a language model and the LLaVA that is built of them."""

from pathlib import Path

import pytest
import torch

from downstream.llava.modeling import Llava, build_llava, load_llava, save_options, save_weights
from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_language_model


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a language model and a QLIP."""
    folder = tmp_path_factory.mktemp("parts")
    return save_language_model(folder / "language"), make_qlip(folder / "qlip")


def build(parts: tuple[Path, Path], **options) -> Llava:
    torch.manual_seed(0)
    return build_llava(language_model=parts[0], visual_tokenizer=parts[1], **options)


def save(folder: Path, llava: Llava, *, dtype: torch.dtype = torch.float32) -> Path:
    save_options(folder, llava, dtype=dtype)
    save_weights(folder, llava.model.state_dict().items(), dtype=dtype)
    return folder


@pytest.fixture(scope="session")
def llava_folder(parts, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("llava"), build(parts))


@pytest.fixture
def llava(llava_folder) -> Llava:
    return load_llava(llava_folder)
