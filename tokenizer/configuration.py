"""The configuration of a QLIP model, in the layout of the released checkpoints' config.json."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from um3.core.errors import UserError

RELEASED_MODEL_TYPE = "clip"
RELEASED_LICENSE = "non-commercial use only (NVIDIA's licence of the released QLIP weights)"


class _TowerChecks:
    hidden_size: int
    num_attention_heads: int

    def validate_architecture(self) -> None:
        """Refuse head counts that do not divide the width, and patches that do not divide the image."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        image_size, patch_size = getattr(self, "image_size", 0), getattr(self, "patch_size", 1)
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")


@strict
class QLIPTextConfig(_TowerChecks, PreTrainedConfig):
    """The CLIP text tower. `eos_token_id == 2` pools at the largest token id (old CLIP), else at the first eos."""

    model_type = "qlip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407


@strict
class QLIPVisionConfig(_TowerChecks, PreTrainedConfig):
    """The EVA-02 style visual encoder and its quantizer."""

    model_type = "qlip_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    k_bias: bool = False
    rope: bool = True
    subln: bool = True
    swiglu: bool = True
    rope_pretrained_grid: int = 16
    hidden_size_post_q: int | None = None
    quantizer: str = "bsq"
    quantizer_embed_type: str = "mlp"
    quantizer_l2_norm: bool = True
    quantizer_cfg: dict[str, Any] | None = None


@strict
class QLIPDecoderConfig(_TowerChecks, PreTrainedConfig):
    """The visual decoder: rotary on every token, then LayerNorm, Linear+tanh, Linear to pixels."""

    model_type = "qlip_decoder"
    base_config_key = "decoder_config"

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    k_bias: bool = False
    rope: bool = True
    subln: bool = True
    swiglu: bool = True
    rope_pretrained_grid: int = 16


SUB_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "text_config": QLIPTextConfig,
    "vision_config": QLIPVisionConfig,
    "decoder_config": QLIPDecoderConfig,
}


@strict
class QLIPConfig(PreTrainedConfig):
    """QLIP: text tower, visual encoder with its quantizer, visual decoder (SPEC section 1).

    The defaults are QLIP-B-16-256. A released folder calls itself `clip`; it is read as what it is, and
    `weights_license` remembers where the weights came from, in every folder saved from them.
    """

    model_type = "qlip"
    sub_configs = SUB_CONFIGS

    text_config: dict | QLIPTextConfig | None = None
    vision_config: dict | QLIPVisionConfig | None = None
    decoder_config: dict | QLIPDecoderConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    text_projection_bias: bool = False
    vision_projection_bias: bool = True
    initializer_range: float = 0.02
    weights_license: str = ""

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in SUB_CONFIGS.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                values = {key: item for key, item in (value or {}).items() if key != "model_type"}
                setattr(self, name, kind(**values))
        super().__post_init__(**kwargs)

    @property
    def text_tower(self) -> QLIPTextConfig:
        """`text_config`, built by now whatever it was given as."""
        assert isinstance(self.text_config, QLIPTextConfig)
        return self.text_config

    @property
    def vision_tower(self) -> QLIPVisionConfig:
        """`vision_config`, built by now whatever it was given as."""
        assert isinstance(self.vision_config, QLIPVisionConfig)
        return self.vision_config

    @property
    def decoder_tower(self) -> QLIPDecoderConfig:
        """`decoder_config`, built by now whatever it was given as."""
        assert isinstance(self.decoder_config, QLIPDecoderConfig)
        return self.decoder_config

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; a released folder's `model_type: clip` is renamed, anything else is refused later."""
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("architectures") == ["QLIPModel"]:
            if values.get("model_type") == RELEASED_MODEL_TYPE:
                values["weights_license"] = RELEASED_LICENSE
            values["model_type"] = cls.model_type
        elif values.get("model_type") != cls.model_type:
            raise UserError(
                f"{args[0] if args else 'config.json'} holds a '{values.get('model_type')}' model, not a QLIP; "
                "give the folder or hub id of a visual tokenizer"
            )
        return values, rest
