"""The config of LlamaGen's training."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from data_mix.batches.config import CodeDataConfig
from downstream.llamagen.settings import PrefixRotation, SizeName, TextEncoderConfig
from train.config import OptimizerConfig, PhaseConfig
from train.run_folder import model_digest
from um3.core.hub import weights_digest
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, Size
from um3.model.configuration import Prediction


@dataclass
class LlamaGenShapeConfig:
    """Shape of the transformer: a published size by name, or the four numbers below it."""

    size: SizeName | Literal[""] = ""
    hidden_size: Size = 128
    num_layers: Size = 4
    num_heads: Size = 4
    intermediate_size: NonNegativeInt = 0
    """0: 8/3 of the width, rounded up to a multiple of 256."""
    subtokens: PositiveInt = 1
    """Ids of a code, of equal bits: 2 for QLIP's 28 bits, 1 for codes of at most 14 bits."""
    prediction: Prediction = "flat"
    """flat: a position for every id; depth: one for every patch, whose ids a small head predicts one by one."""
    depth_layers: Annotated[int, Range(1, 4)] = 1
    """Layers of that head."""
    prefix_rotation: PrefixRotation = "identity"
    """zero: as released; an image position then sees only the mean of the caption's values."""
    dropout: Share = 0.1
    initializer_range: NonNegativeFloat = 0.02


@dataclass
class LlamaGenTrainingConfig(PhaseConfig):
    """LlamaGen: text-to-image on code shards."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-4, weight_decay=0.05, schedule="constant", warmup_steps=0)
    )
    """As released: rate 1e-4 for 256 images, constant, no warm-up."""
    model: LlamaGenShapeConfig = field(default_factory=LlamaGenShapeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    text_features: str = ""
    """Folder of `make text-features`, from which caption features are read; empty: encode captions in the loop."""
    clean: bool = False
    """Clean captions as the released text-to-image models' were (needs `um3[llamagen]`)."""
    data: CodeDataConfig = field(default_factory=CodeDataConfig)
    visual_tokenizer: str = ""
    """QLIP folder or hub id that made the codes, such as runs/demo/stage2/model."""
    external_tokenizer: str = ""
    """The tokenizer from elsewhere that made the codes (as in `make codes`). visual_tokenizer then serves only for
    text_encoder.kind=qlip."""
    chunk_tokens: PositiveInt = 2048
    """Maximum number of positions whose logits exist at a time."""

    def resolved_text_encoder(self) -> TextEncoderConfig:
        """The text encoder; kind qlip without a name is the visual tokenizer's own text tower."""
        own_tower = self.text_encoder.kind == "qlip" and not self.text_encoder.name
        return replace(self.text_encoder, name=self.visual_tokenizer) if own_tower else self.text_encoder

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that training starts from; other inputs make another run."""
        name = self.resolved_text_encoder().name
        tokenizer = self.external_tokenizer or model_digest(self.visual_tokenizer, made_by="stage2")
        return {"visual_tokenizer": tokenizer, "text_encoder": weights_digest(name) or name}
