"""The language model's config, apart from the model so that reading it costs nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Supervision = Literal["target", "all"]
"""Which positions of a row are targets: what it is to produce, or everything after the first."""
NewTokenInit = Literal["mean", "random"]
"""How rows that a base lacks begin: as the mean of its own (the paper), or normal with their standard deviation."""


@dataclass
class ModelConfig:
    """The language model. With `base_model` the sizes are the base's, and only `qk_norm` and `new_token_init` matter.

    base_model: a Llama or Qwen (folder or hub id) to extend, or the folder of a UM3 (`make um3-init`, or a trained one) to
        go on from as it is.
    """

    base_model: str = ""
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 32
    intermediate_size: int = 512
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 512
    qk_norm: bool = True
    new_token_init: NewTokenInit = "mean"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")


def is_um3(path: str | Path) -> bool:
    """Whether a folder holds a UM3: its config.json has an id space."""
    try:
        return "um3" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
