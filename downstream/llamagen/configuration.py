"""The configuration of LlamaGen, and its published sizes."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from downstream.llamagen.settings import PrefixRotation, SizeName
from um3.model.configuration import Prediction

SIZES: dict[SizeName, dict[str, int]] = {
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "XL": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "XXL": {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24},
    "3B": {"hidden_size": 3200, "num_hidden_layers": 24, "num_attention_heads": 32},
}
"""The sizes of LlamaGen (arXiv:2406.06525, Table 1); XL is that of the paper's text-to-image models."""


@strict
class LlamaGenConfig(PreTrainedConfig):
    """A LlamaGen for captions of `max_caption_tokens` features and images of `num_patches` codes.

    A code is `subtokens` ids, each of `bits_per_subtoken` bits with input and output rows of its own; one sub-token is
    the released model. `prediction`: "flat" gives every id a position of its own; "depth" gives a patch one, whose ids
    are predicted one after the other by `depth_layers` layers at its end (RQ-Transformer, arXiv:2203.01941).
    `prefix_rotation`: "zero" (released weights) erases queries and keys of the caption, so that an
    image position sees the mean of the caption's values; "identity" leaves them unrotated.
    """

    model_type = "llamagen"

    hidden_size: int = 1280
    intermediate_size: int = 0
    """0: 8/3 of the width, rounded up to a multiple of 256."""
    num_hidden_layers: int = 36
    num_attention_heads: int = 20
    num_key_value_heads: int = 0
    """0: as many as attention heads."""
    caption_width: int = 2048
    max_caption_tokens: int = 120
    num_patches: int = 256
    subtokens: int = 1
    bits_per_subtoken: int = 14
    prediction: Prediction = "flat"
    depth_layers: int = 1
    """Layers of the depth head; without effect where `prediction` is "flat"."""
    prefix_rotation: PrefixRotation = "zero"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    dropout: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    text_encoder: dict[str, Any] | None = None
    """The fields of `TextEncoderConfig`; None for a converted file, whose text encoder is not said."""
    clean_captions: bool = False
    tokenizer_fingerprint: str = ""

    def __post_init__(self, **options: Any) -> None:
        self.intermediate_size = self.intermediate_size or -(-(8 * self.hidden_size // 3) // 256) * 256
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        super().__post_init__(**options)

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return math.isqrt(self.num_patches)

    @property
    def slot_size(self) -> int:
        """Ids of one sub-token, V."""
        return 1 << self.bits_per_subtoken

    @property
    def image_tokens(self) -> int:
        """Ids of an image, P."""
        return self.num_patches * self.subtokens

    @property
    def positions_per_patch(self) -> int:
        """Positions of a patch in the transformer."""
        return 1 if self.prediction == "depth" else self.subtokens

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together."""
        width, heads = self.hidden_size, self.num_attention_heads
        sizes = (width, heads, self.num_hidden_layers, self.subtokens, self.max_caption_tokens, self.caption_width)
        if min(*sizes, self.num_patches) < 1:
            raise ValueError("the sizes of a LlamaGen must be at least 1")
        if not (0 < self.rope_theta < math.inf and 0 < self.rms_norm_eps < math.inf):
            raise ValueError(f"rope_theta {self.rope_theta} and rms_norm_eps {self.rms_norm_eps} must be above 0")
        if width % heads or width // heads % 4:
            raise ValueError(f"hidden_size {width} / num_attention_heads {heads} is not a multiple of 4")
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of {self.num_key_value_heads} key heads")
        if self.grid**2 != self.num_patches:
            raise ValueError(f"num_patches {self.num_patches} is not a square, which the two rotary axes need")
        if self.prediction == "depth" and not (1 <= self.depth_layers <= 4 and self.subtokens > 1):
            raise ValueError(
                f"prediction depth needs 2 or more subtokens and 1 to 4 depth_layers, not {self.subtokens} and "
                f"{self.depth_layers}"
            )
        if not 1 <= self.bits_per_subtoken <= 20:
            raise ValueError(f"bits_per_subtoken {self.bits_per_subtoken} is outside 1 to 20")
