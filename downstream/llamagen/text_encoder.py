"""Text encoders of LlamaGen: captions -> features, padded on the left as the model reads them.

Legend: B captions, T positions of the longest, C width of the features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from downstream.llamagen.settings import TextEncoderConfig
from tokenizer.modeling import TextModel, load_qlip
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError
from um3.core.hub import load_pretrained, model_folder
from um3.core.text import valid_text


class CaptionFeatures(NamedTuple):
    """`features` (B, T, C), zero at padding, and `mask` bool (B, T), true at caption tokens, which come last."""

    features: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "CaptionFeatures":
        """Both tensors on a device."""
        return CaptionFeatures(self.features.to(device), self.mask.to(device))


class TextEncoder:
    """The hidden states of a text encoder after its first `num_layers` layers (-1: all) and its final norm."""

    width: int

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype | None = None):
        """Load the encoder; `dtype` is float32 by default. UserError if the folder has no weights, no tokenizer or
        fewer layers."""
        self.max_tokens = config.max_tokens
        self.model: Any
        if config.kind == "t5":
            from transformers import AutoTokenizer, T5EncoderModel

            options: dict[str, Any] = {"kind": "T5 text encoder"}
            folder = model_folder(config.name, **options)
            if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
                raise UserError(f"{folder} holds a T5 text encoder without its tokenizer; add tokenizer.json to it")
            self.tokenizer = load_pretrained(AutoTokenizer, folder, **options)
            self.model = load_pretrained(T5EncoderModel, folder, dtype=dtype or torch.float32, **options)
            self.width = self.model.config.d_model
        else:
            qlip = load_qlip(config.name)
            processor = QLIPProcessor.from_pretrained(config.name)
            self.tokenizer = processor.text_tokenizer
            self.max_tokens = min(self.max_tokens, processor.max_text_tokens)
            self.model = qlip.text_model.to(dtype or torch.float32)
            self.width = qlip.config.text_tower.hidden_size
        keep_layers(self.model, config.num_layers)
        self.model.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> CaptionFeatures:
        """Encode captions, padded to the longest of them; a caption's features do not depend on the others."""
        device = next(self.model.parameters()).device
        options: Any = {"truncation": True, "max_length": self.max_tokens, "padding": True, "padding_side": "right"}
        encoded = self.tokenizer([valid_text(caption) for caption in captions], return_tensors="pt", **options)
        input_ids_BT, mask_BT = encoded["input_ids"].to(device), encoded["attention_mask"].to(device).bool()
        if isinstance(self.model, TextModel):  # it is causal: padding on the right reaches no caption token
            states_BTC = self.model.hidden_states(input_ids_BT)
        else:
            states_BTC = self.model(input_ids=input_ids_BT, attention_mask=mask_BT).last_hidden_state
        # A stable sort of the mask moves the padding to the front and keeps the order of the caption.
        order_BT = mask_BT.long().argsort(dim=1, stable=True)
        features_BTC = states_BTC.masked_fill(~mask_BT[..., None], 0.0).gather(
            1, order_BT[..., None].expand_as(states_BTC)
        )
        return CaptionFeatures(features_BTC, mask_BT.gather(1, order_BT))


def keep_layers(model: nn.Module, num_layers: int) -> None:
    """Keep the first layers (-1: all) of a T5 encoder or a QLIP's text tower; UserError if it has fewer."""
    encoder: Any = model.encoder
    layers = encoder.layers if isinstance(model, TextModel) else encoder.block
    if num_layers > len(layers):
        raise UserError(f"text_encoder.num_layers={num_layers}, but the encoder has {len(layers)} layers; set it to -1")
    if num_layers >= 0:
        del layers[num_layers:]
