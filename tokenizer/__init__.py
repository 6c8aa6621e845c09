"""QLIP, the text-aligned visual tokenizer: images -> codes -> images, its text tower, losses and released layout.

It knows nothing of language models or training loops. Importing it registers QLIP, and its encoder as a
vision tower, with transformers' Auto classes.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor

from tokenizer.configuration import QLIPConfig, QLIPVisionConfig
from tokenizer.modeling import QLIPModel, load_qlip
from tokenizer.processor import QLIPProcessor
from tokenizer.tower import QLIPVisionTower

__all__ = ["QLIPConfig", "QLIPModel", "QLIPProcessor", "QLIPVisionTower", "load"]

AutoConfig.register(QLIPConfig.model_type, QLIPConfig)
AutoModel.register(QLIPConfig, QLIPModel)
AutoProcessor.register(QLIPConfig, QLIPProcessor)
AutoConfig.register(QLIPVisionConfig.model_type, QLIPVisionConfig)
AutoModel.register(QLIPVisionConfig, QLIPVisionTower)


def load(path_or_hub_id: str | Path) -> tuple[QLIPModel, QLIPProcessor]:
    """Load a QLIP folder or hub id: the model in eval mode and its processor. Raises as `load_qlip` does."""
    return load_qlip(path_or_hub_id).eval(), QLIPProcessor.from_pretrained(path_or_hub_id)
