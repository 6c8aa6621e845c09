"""A tiny QLIP with random weights, and files in the published layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizer.configuration import QLIPConfig
from tokenizer.losses import VGG16_PLAN
from tokenizer.modeling import QLIPModel

GOLDEN = Path(__file__).parent / "golden"


def tiny_config(**changes: object) -> QLIPConfig:
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    tower |= dict(patch_size=8, rope_pretrained_grid=2)
    text: dict[str, object] = {name: tower[name] for name in list(tower)[:4]} | {"vocab_size": 300}
    text |= dict(max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_act="gelu")
    vision = {**tower, "quantizer_cfg": {"embed_dim": 28, "group_size": 1}, **changes}
    decoder = {key: value for key, value in vision.items() if not key.startswith(("quantizer", "hidden_size_post"))}
    return QLIPConfig(text_config=text, vision_config=vision, decoder_config=decoder, projection_dim=24)


@pytest.fixture
def tiny_qlip() -> QLIPModel:
    torch.manual_seed(0)
    return QLIPModel(tiny_config()).eval()


def change_json(path: Path, **changes: Any) -> None:
    """Set values in a JSON file; a dictionary sets values of a section."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values))


def lpips_files(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """VGG-16's and LPIPS's files in the published layout, with random weights."""
    generator, features, position, width = torch.Generator().manual_seed(seed), {}, 0, 3
    for index, widths in enumerate(VGG16_PLAN):
        position += index > 0
        for wider in widths:
            features[f"features.{position}.weight"] = 0.05 * torch.randn(wider, width, 3, 3, generator=generator)
            features[f"features.{position}.bias"] = torch.zeros(wider)
            position, width = position + 2, wider
    assert "features.28.weight" in features and position == 30  # torchvision's last VGG-16 convolution
    heads = {f"lin{i}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for i, widths in enumerate(VGG16_PLAN)}
    files = folder / f"vgg{seed}.pth", folder / f"heads{seed}.pth"
    for table, file in zip((features, heads), files, strict=True):
        torch.save(table, file)
    return files
