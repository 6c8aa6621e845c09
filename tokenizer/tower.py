"""QLIP's visual encoder as a vision tower for transformers' models, such as `LlavaForConditionalGeneration`.

Legend: B batch, C channels, H, W pixels, T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import capture_outputs

from tokenizer.configuration import QLIPVisionConfig
from tokenizer.layers import Block
from tokenizer.modeling import QLIPModel, VisionModel


class QLIPVisionTower(PreTrainedModel):
    """The visual encoder, whose hidden states (B, 1 + N, D) are those of `QLIPModel`, class token first.

    `hidden_states` are the embeddings' output and that of every layer, before any norm. With
    `config.tie_last_hidden_states` the last one holds the patches after the quantizer, as the decoder reads them
    (the paper's "-1, after Q"); `last_hidden_state` is always the last of them.
    """

    config_class = QLIPVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": Block}  # noqa: RUF012

    def __init__(self, config: QLIPVisionConfig):
        super().__init__(config)
        if config.tie_last_hidden_states and config.hidden_size_post_q not in (None, config.hidden_size):
            widths = f"{config.hidden_size_post_q} wide, the class token {config.hidden_size}"
            raise ValueError(f"the patches after the quantizer are {widths}; set tie_last_hidden_states=false")
        self.vision_model = VisionModel(config)
        self.post_init()

    @classmethod
    def from_qlip(cls, qlip: QLIPModel, *, quantized: bool = False) -> "QLIPVisionTower":
        """The encoder of `qlip`, sharing its weights; `quantized` sets `tie_last_hidden_states`."""
        config = QLIPVisionConfig.from_dict(
            qlip.config.vision_tower.to_dict() | {"tie_last_hidden_states": quantized, "dtype": qlip.dtype}
        )
        with torch.device("meta"):
            tower = cls(config)
        tower.vision_model.load_state_dict(qlip.vision_model.state_dict(), assign=True)
        return tower.train(qlip.training)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) -> hidden states, and the normalised class token (B, D) as `pooler_output`."""
        hidden_BTD = self.vision_model(pixel_values)
        pooled_BD = self.vision_model.post_layernorm(hidden_BTD[:, 0])
        if self.config.tie_last_hidden_states:
            codes_BNL = self.vision_model.quantize(hidden_BTD, entropy=False).quantized_BNL
            patches_BND = self.vision_model.quant_embed_post(codes_BNL.to(hidden_BTD.dtype))
            hidden_BTD = torch.cat([hidden_BTD[:, :1], patches_BND], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_BTD, pooler_output=pooled_BD)
