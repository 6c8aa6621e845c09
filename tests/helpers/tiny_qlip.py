"""A QLIP folder with random weights, small enough to encode thousands of images a second."""

from collections.abc import Iterable
from pathlib import Path

import torch

from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from tokenizer.text_tokenizer import train_caption_tokenizer


def make_qlip(
    folder: Path, *, image_size: int = 24, patch_size: int = 12, bits: int = 12, seed: int = 0,
    captions: Iterable[str] = (),
) -> Path:  # fmt: skip
    """Write model and processor to `folder`; the processor has a text tokenizer if there are captions to train it."""
    text_tokenizer = train_caption_tokenizer(captions, vocab_size=300) if captions else None
    text = {"vocab_size": len(text_tokenizer), "eos_token_id": text_tokenizer.eos_token_id} if text_tokenizer else {}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": image_size, "patch_size": patch_size, "rope_pretrained_grid": image_size // patch_size}
    torch.manual_seed(seed)
    config = QLIPConfig(
        vision_config=size | image | {"quantizer_cfg": {"embed_dim": bits}},
        decoder_config=size | image,
        text_config=size | {"vocab_size": 40, "max_position_embeddings": 16} | text,
        projection_dim=16,
        initializer_range=0.2,
    )
    QLIPModel(config).save_pretrained(folder)
    QLIPProcessor(text_tokenizer, image_size=image_size, max_text_tokens=16).save_pretrained(folder)
    return folder
