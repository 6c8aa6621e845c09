"""A very small QLIP, built on the spot."""

import pytest
import torch

from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel


def tiny_config(**changes: object) -> QLIPConfig:
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    tower |= dict(patch_size=8, rope_pretrained_grid=2)
    text: dict[str, object] = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    text |= dict(max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_act="gelu")
    vision = {**tower, "quantizer_cfg": {"embed_dim": 28, "group_size": 1}, **changes}
    decoder = {key: value for key, value in vision.items() if not key.startswith(("quantizer", "hidden_size_post"))}
    return QLIPConfig(text_config=text, vision_config=vision, decoder_config=decoder, projection_dim=24)


@pytest.fixture
def tiny_qlip() -> QLIPModel:
    torch.manual_seed(0)
    return QLIPModel(tiny_config()).eval()
