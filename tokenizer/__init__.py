"""QLIP, the text-aligned visual tokenizer: images -> codes -> images, its text tower, losses and released layout.

Knows nothing of language models or training loops. Importing it tells transformers' Auto classes what a QLIP is.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor

from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel, load_qlip
from tokenizer.processor import QLIPProcessor

__all__ = ["QLIPConfig", "QLIPModel", "QLIPProcessor", "load"]

AutoConfig.register(QLIPConfig.model_type, QLIPConfig)
AutoModel.register(QLIPConfig, QLIPModel)
AutoProcessor.register(QLIPConfig, QLIPProcessor)


def load(folder: str | Path) -> tuple[QLIPModel, QLIPProcessor]:
    """Load a QLIP folder or hub id: the model in eval mode and its processor."""
    return load_qlip(folder).eval(), QLIPProcessor.from_pretrained(folder)
