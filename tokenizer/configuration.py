"""The configuration of a QLIP model, in the layout of the released checkpoints' config.json."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from um3.core.errors import UserError
from um3.core.hub import load_pretrained

RELEASED_MODEL_TYPE = "clip"
RELEASED_LICENSE = "non-commercial use only (NVIDIA's licence of the released QLIP weights)"
NEUTRAL_OPTIONS = {
    "dropout", "attention_dropout", "initializer_range", "initializer_factor", "tie_word_embeddings", "torch_dtype",
    "model_type", "auto_map", "tokenizer_class", "processor_class", "num_labels", "name_or_path", "_name_or_path",
    "_commit_hash", "attn_implementation", "experts_implementation", *GenerationConfig().to_dict(),
}  # fmt: skip
"""Options of transformers' configs that change no output of a trained QLIP; they are ignored."""

SIZES = ("_size", "_layers", "_heads", "_channels", "_dim", "_embeddings", "_grid")
"""Ends of the names of a tower's sizes."""


def check_options(
    options: Mapping[str, Any], *, known: Collection[str], where: str | Path, falsy: bool = False
) -> None:
    """Raise ValueError for an option that is not `known`; with `falsy`, null, false, 0 and empty ones are known too."""
    for name in sorted(options.keys() - known):
        if options[name] or not falsy:
            raise ValueError(f"{where}: unknown option {name}={options[name]!r}; remove it if it changes no output")


@strict
class _TowerConfig(PreTrainedConfig):
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **options: Any) -> None:
        check_options(options, known=NEUTRAL_OPTIONS, falsy=True, where=self.base_config_key)
        super().__post_init__(**options)

    def validate_architecture(self) -> None:
        """Refuse sizes below 1, head counts that do not divide the width, patches that do not divide the image."""
        for name, value in vars(self).items():
            if name.endswith(SIZES) and isinstance(value, int) and value < 1:
                raise ValueError(f"{self.base_config_key}.{name} is {value}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        image_size, patch_size = getattr(self, "image_size", 0), getattr(self, "patch_size", 1)
        overlap = getattr(self, "overlap", 0)
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if not 0 <= overlap <= patch_size:
            raise ValueError(f"overlap {overlap} is not between 0 and patch_size {patch_size}")


@strict
class QLIPTextConfig(_TowerConfig):
    """The CLIP text tower. `eos_token_id == 2` pools at the largest token id (old CLIP), else at the first eos."""

    model_type = "qlip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    projection_dim: int = 512
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407


@strict
class _VisualTowerConfig(_TowerConfig):
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    k_bias: bool = False
    rope: bool = True
    subln: bool = True
    swiglu: bool = True
    rope_pretrained_grid: int = 16


@strict
class QLIPVisionConfig(_VisualTowerConfig):
    """The EVA-02 style visual encoder and its quantizer (`quantizer_cfg`: see `tokenizer.quantizer`)."""

    model_type = "qlip_vision"
    base_config_key = "vision_config"

    hidden_size_post_q: int | None = None
    quantizer: str = "bsq"
    quantizer_embed_type: str = "mlp"
    quantizer_l2_norm: bool = True
    quantizer_cfg: dict[str, Any] | None = None
    tie_last_hidden_states: bool = False
    """Of `QLIPVisionTower`: its last hidden state holds the patches after the quantizer."""


@strict
class QLIPDecoderConfig(_VisualTowerConfig):
    """The visual decoder: rotary embedding on every token, then LayerNorm, Linear+tanh, Linear to pixels."""

    model_type = "qlip_decoder"
    base_config_key = "decoder_config"

    overlap: int = 0
    """Pixels by which a patch's output reaches over each side of the patch; neighbours are blended there."""


SUB_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    kind.base_config_key: kind for kind in (QLIPTextConfig, QLIPVisionConfig, QLIPDecoderConfig)
}


@strict
class QLIPConfig(PreTrainedConfig):
    """QLIP: text tower, visual encoder with its quantizer, visual decoder (SPEC section 1).

    The defaults are QLIP-B-16-256. A released folder has the model type `clip`. For weights from such a folder
    `weights_license` holds their licence; every folder saved from them keeps it.
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

    def __post_init__(self, **options: Any) -> None:
        check_options(options, known=NEUTRAL_OPTIONS, falsy=True, where="config.json")
        for name, kind in SUB_CONFIGS.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                setattr(self, name, kind(**{key: item for key, item in (value or {}).items() if key != "model_type"}))
        super().__post_init__(**options)

    @property
    def text_tower(self) -> QLIPTextConfig:
        """`text_config` as an object."""
        return cast(QLIPTextConfig, self.text_config)

    @property
    def vision_tower(self) -> QLIPVisionConfig:
        """`vision_config` as an object."""
        return cast(QLIPVisionConfig, self.vision_config)

    @property
    def decoder_tower(self) -> QLIPDecoderConfig:
        """`decoder_config` as an object."""
        return cast(QLIPDecoderConfig, self.decoder_config)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; rename the released `model_type: clip`, and refuse other models."""
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("architectures") == ["QLIPModel"]:
            if values.get("model_type") == RELEASED_MODEL_TYPE:
                values["weights_license"] = RELEASED_LICENSE
            values["model_type"] = cls.model_type
        elif values.get("model_type") != cls.model_type:
            where, kind = args[0] if args else "config.json", values.get("model_type")
            raise UserError(
                f"{where} holds a '{kind}' model, not a QLIP; use the folder or hub id of a visual tokenizer"
            )
        return values, rest


def read_qlip_config(folder: Path) -> QLIPConfig:
    """The config of a QLIP folder; UserError for another kind of model, an unknown option or an invalid value."""
    return load_pretrained(QLIPConfig, folder, kind="QLIP tokenizer")
