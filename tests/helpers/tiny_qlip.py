"""A QLIP folder with random weights, small enough to encode thousands of images a second."""

from pathlib import Path

import torch

from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor


def make_qlip(folder: Path, *, image_size: int = 24, patch_size: int = 12, bits: int = 12, seed: int = 0) -> Path:
    """Write model and processor to `folder`; the processor has no text tokenizer."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = size | {"image_size": image_size, "patch_size": patch_size, "rope_pretrained_grid": 2}
    config = QLIPConfig(
        vision_config=tower | {"quantizer_cfg": {"embed_dim": bits, "group_size": 1}},
        decoder_config=tower,
        text_config=size | {"vocab_size": 20, "max_position_embeddings": 8},
        projection_dim=8,
        initializer_range=0.2,
    )
    QLIPModel(config).save_pretrained(folder)
    QLIPProcessor(None, image_size=image_size, max_text_tokens=8).save_pretrained(folder)
    return folder
