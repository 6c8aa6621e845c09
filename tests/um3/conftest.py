"""What the tests of this room share: id spaces, and a tiny saved model with an untrained visual tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.inference.pipeline import UM3Pipeline
from um3.model.language_model import ModelConfig, build_model, save_model
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer
from um3.model.vocabulary import UnifiedVocabulary

IMAGE_SIZE, PATCH_SIZE = 16, 8
TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("square", "disk")] * 3


def _make_ids(
    *, subtokens: int = 4, bits_per_subtoken: int = 7, num_patches: int = 16, text_vocab_size: int = 50
) -> UnifiedVocabulary:
    return UnifiedVocabulary(
        text_vocab_size=text_vocab_size,
        subtokens=subtokens,
        bits_per_subtoken=bits_per_subtoken,
        num_patches=num_patches,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        begin_of_image_id=3,
        end_of_image_id=4,
    )


@pytest.fixture
def make_ids() -> Callable[..., UnifiedVocabulary]:
    """An id space with bos, eos, pad, <boi>, <eoi> = 0 .. 4 and everything else adjustable."""
    return _make_ids


def save_qlip(folder: Path, *, image_size: int, patch_size: int) -> None:
    """Write an untrained QLIP of codes of 28 bits."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    grid = image_size // patch_size
    picture = tower | {"image_size": image_size, "patch_size": patch_size, "rope_pretrained_grid": grid}
    torch.manual_seed(0)
    qlip = QLIPModel(
        QLIPConfig(
            text_config=tower | {"vocab_size": 40, "max_position_embeddings": 16},
            vision_config=picture | {"quantizer_cfg": {"embed_dim": 28}},
            decoder_config=picture,
            projection_dim=16,
            initializer_range=0.3,
        )
    )
    qlip.save_pretrained(folder)
    QLIPProcessor(None, image_size=image_size, max_text_tokens=16).save_pretrained(folder)


@pytest.fixture(scope="session")
def qlip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained QLIP of 4 patches of 28 bits."""
    folder = tmp_path_factory.mktemp("qlip")
    save_qlip(folder, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    return folder


@pytest.fixture(scope="session")
def model_folder(qlip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved UM3 with random weights, loud enough that greedy choices are far apart."""
    text_tokenizer = train_text_tokenizer(TEXTS, vocab_size=280)
    ids = make_vocabulary(text_tokenizer, subtokens=4, bits_per_subtoken=7, num_patches=4)
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
    config.max_position_embeddings = 64
    model = build_model(config, ids=ids)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(10.0)
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model(folder, model=model, text_tokenizer=text_tokenizer, ids=ids, qlip_folder=qlip_folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> UM3Pipeline:
    """The pipeline over `model_folder`."""
    return UM3Pipeline.from_pretrained(model_folder)
