"""Settings of LlamaGen that a config names. This module does not import torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from um3.core.ranges import Range

PrefixRotation = Literal["zero", "identity"]
SizeName = Literal["B", "L", "XL", "XXL", "3B"]


@dataclass
class TextEncoderConfig:
    """The frozen text encoder: FLAN-T5 (arXiv:2406.06525), or a QLIP's own text tower."""

    kind: Literal["t5", "qlip"] = "t5"
    name: str = "google/flan-t5-xl"
    """Folder or hub id of the T5, or of the QLIP; with kind qlip, empty is the visual tokenizer."""
    max_tokens: Annotated[int, Range(2, 2**16)] = 120
    """Longer captions are cut; their end token stays."""
    num_layers: Annotated[int, Range(-1, 2**16)] = -1
    """Layers to run before the final norm: -1 for all, 0 for the embeddings alone. A CLIP's text tower is trained to
    describe the whole caption at its end; the last states of a small one no longer tell what belongs to what."""
