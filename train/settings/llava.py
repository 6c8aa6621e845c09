"""The configs of `make llava-align` and `make llava-instruct`. This module does not import torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from data_mix.batches.config import LlavaDataConfig
from train.config import OptimizerConfig, PhaseConfig
from train.run_folder import model_digest
from um3.core.errors import UserError
from um3.core.ranges import PositiveInt, Range, Share


def _optimizer(lr: float) -> OptimizerConfig:
    """transformers' AdamW, without clipping, as LLaVA-1.5 was trained."""
    return OptimizerConfig(lr=lr, betas=[0.9, 0.999], weight_decay=0.0, grad_clip=0.0, warmup_steps=0)


@dataclass
class LlavaConfig(PhaseConfig):
    """What both stages of LLaVA-1.5 have in common."""

    optimizer: OptimizerConfig = field(default_factory=lambda: _optimizer(2e-5))
    warmup_share: Share = 0.03
    """Share of loop.max_steps, rounded up, over which the learning rate rises; 0: optimizer.warmup_steps."""
    data: LlavaDataConfig = field(default_factory=LlavaDataConfig)
    chunk_tokens: PositiveInt = 2048
    """Maximum number of positions whose logits exist at a time."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the saved weights; "base" keeps that of the model that training starts from."""

    def __post_init__(self) -> None:
        if self.warmup_share and self.optimizer.warmup_steps:
            raise ValueError("warmup_share and optimizer.warmup_steps are both set; set one of them to 0")

    @property
    def schedule(self) -> OptimizerConfig:
        """The optimizer with its number of warm-up steps."""
        if not self.warmup_share:
            return self.optimizer
        return replace(self.optimizer, warmup_steps=math.ceil(self.warmup_share * self.loop.max_steps))


@dataclass
class LlavaAlignConfig(LlavaConfig):
    """Stage 1: a new projector learns to translate the encoder's features; nothing else is trained."""

    optimizer: OptimizerConfig = field(default_factory=lambda: _optimizer(1e-3))
    data: LlavaDataConfig = field(default_factory=lambda: LlavaDataConfig(template="plain", pad_to_square=False))
    language_model: str = ""
    """Llama or Qwen language model: a folder or hub id."""
    visual_tokenizer: str = ""
    """QLIP folder or hub id, whose encoder is the vision tower."""
    vision_feature_layer: Annotated[int, Range(-1000, 1000)] = -2
    """Which hidden state the projector reads: -1 the last layer's output, -2 that of the layer before."""
    quantized_features: bool = False
    """With vision_feature_layer=-1, read the patches after the quantizer (paper, Table 6)."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that the LLaVA is made of; other inputs make another run."""
        if not self.language_model:
            raise UserError("language_model is empty; set it to a Llama or Qwen (BASE=folder or hub id)")
        inputs = {"visual_tokenizer": model_digest(self.visual_tokenizer, made_by="stage2")}
        phase = self.language_model.removesuffix("-export")
        export = "um3-export" + f" MODEL={phase}/model" * (phase != self.language_model)
        return inputs | {"language_model": model_digest(self.language_model, made_by=export)}


@dataclass
class LlavaInstructConfig(LlavaConfig):
    """Stage 2: projector and language model learn from conversations; the encoder stays frozen."""

    init_from: str = ""
    """LLaVA folder to start from, such as runs/demo/llava-align/model."""

    def inputs(self) -> dict[str, str]:
        """Fingerprint of the model that training starts from; another model makes another run."""
        return {"init_from": model_digest(self.init_from, made_by="llava-align")}
