"""The language model's config, apart from the model so that reading it costs nothing."""

from dataclasses import dataclass
from typing import Literal

Supervision = Literal["target", "all"]
"""Which positions of a row are targets: what it is to produce, or everything after the first."""


@dataclass
class ModelConfig:
    """The language model. With `base` (a folder or hub id) only `qk_norm` matters, the sizes are the base's."""

    base: str = ""
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 32
    intermediate_size: int = 512
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 512
    qk_norm: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")
