import numpy as np
import pytest
import torch

from data_mix.scenes import ScenesSource
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from tokenizer.text import train_caption_tokenizer


@pytest.fixture(scope="session")
def scenes():
    """Forty held-out scenes: images (N, 32, 32, 3) and all captions of each."""
    source = ScenesSource(size=32, length=40, seed=0, split="val")
    samples = [source[index] for index in range(len(source))]
    return np.stack([sample.image_HWC for sample in samples]), [sample.captions for sample in samples]


@pytest.fixture(scope="session")
def qlip_folder(tmp_path_factory, scenes):
    """A tiny QLIP with random weights and its processor, saved as a folder: 32 pixels, 16 patches of 8 bits."""
    folder = tmp_path_factory.mktemp("qlip")
    text = train_caption_tokenizer([caption for given in scenes[1] for caption in given], vocab_size=400)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 32, "patch_size": 8, "rope_pretrained_grid": 4}
    config = QLIPConfig(
        text_config={**tower, "vocab_size": len(text), "projection_dim": 16, "eos_token_id": text.eos_token_id},
        vision_config={**tower, **image, "quantizer_cfg": {"embed_dim": 8, "group_size": 1}},
        decoder_config={**tower, **image},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = QLIPModel(config)
    model.save_pretrained(folder)
    QLIPProcessor(
        text, image_size=32, max_text_tokens=config.text_config.max_position_embeddings
    ).save_pretrained(folder)
    return folder
