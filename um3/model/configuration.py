"""The language model's config; importing it loads neither torch nor transformers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from um3.core.ranges import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, Range, Size

Supervision = Literal["target", "all"]
"""Which positions of a training sequence are predicted: its answer, or everything after the first token."""
NewTokenInit = Literal["mean", "random"]
"""How rows that a base lacks start: as the mean of its rows (the paper), or normal with their standard deviation."""
Prediction = Literal["flat", "depth"]
"""flat: every sub-token has a position; depth: a patch has one, and a small head predicts its sub-tokens one by one."""
GGUFType = Literal["f32", "bf16", "f16", "q8_0"]
"""Types of the matrices in a GGUF file that `um3 gguf` writes."""
IMAGE_SAMPLING: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "guidance_scale": 2.0}
"""Default sampling options for images, as measured in configs/demo.yaml. `um3.model.language_model.save_model` writes
them to `generation_config.json` under "image_sampling", where a model's owner can change them."""

OLD_KEYS = {"text_vocab_size": "text_entries", "subtokens": "slots", "bits_per_subtoken": "bits_per_slot"}
"""Names of versions before 0.2 in the "um3" table of a model's config.json."""

HUGGING_FACE_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_tokens": "max_position_embeddings",
}


def hugging_face_options(config: object, *names: str) -> dict[str, Any]:
    """These fields of a config under the names of Hugging Face's configs."""
    return {HUGGING_FACE_NAMES.get(name, name): getattr(config, name) for name in names}


@dataclass
class ModelConfig:
    """The language model. With `base_model` the sizes come from it; only `qk_norm` and `new_token_init` apply.

    base_model: a Llama or Qwen (folder, hub id or GGUF file) to extend, or the folder of a UM3 (from `make um3-init` or
        a finished training) to train on.
    """

    base_model: str = ""
    hidden_size: Size = 192
    num_layers: Size = 6
    num_heads: Size = 6
    num_kv_heads: Size = 6
    head_dim: Size = 32
    intermediate_size: Size = 512
    rope_theta: PositiveFloat = 10_000.0
    max_position_embeddings: Size = 512
    qk_norm: bool = True
    new_token_init: NewTokenInit = "mean"
    tie_word_embeddings: bool = False
    initializer_range: NonNegativeFloat = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for rotary position embedding")


@dataclass
class LoRAConfig:
    """LoRA adapters (peft): the base is frozen, and only they and the rows that the base lacks are trained.

    rank: inner dimension of an adapter; 0: no adapters.
    alpha: an adapter's output is scaled by alpha / rank.
    dropout: on the input of the adapters.
    target_modules: linear modules of the layers that get an adapter.
    """

    rank: Annotated[int, Range(0, 2**12)] = 0
    alpha: PositiveInt = 32
    dropout: Decay = 0.0
    target_modules: Annotated[list[str], Range(1)] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def is_um3(path: str | Path) -> bool:
    """True if `path` is the folder of a UM3: its config.json has a "um3" section."""
    try:
        return "um3" in dict(json.loads((Path(path) / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
