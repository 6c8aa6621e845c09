"""The configs of UM3's phases, `UM3InitConfig`, `UM3Config` and `UM3InstructConfig`, and their sections."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from data_mix.batches.config import ChatDataConfig, DataConfig
from data_mix.sources.config import ConversationSourceConfig
from data_mix.sources.text import TextSourceConfig
from train.config import LoopConfig, OptimizerConfig, PhaseConfig, check_intervals
from train.run_folder import model_digest
from um3.core.errors import UserError
from um3.core.hub import weights_digest
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Size
from um3.inference.sampling_params import Sampling, as_options
from um3.model.configuration import LoRAConfig, ModelConfig, NewTokenInit, Prediction, is_um3


@dataclass
class UM3LossConfig:
    """The language-model loss (SPEC section 2): split softmax (paper, Eq 6) or joint, for the ablation."""

    mode: Literal["split", "joint"] = "split"
    text_weight: NonNegativeFloat = 1.0
    visual_weight: NonNegativeFloat = 1.0
    """Each half's loss is its mean over the targets of that half in the global batch, times its weight."""
    z_loss: NonNegativeFloat = 0.0
    chunk_tokens: PositiveInt = 2048
    """Maximum number of positions whose logits exist at a time; fewer if they would take more than 256 MiB."""


@dataclass
class VocabularyConfig:
    """The text vocabulary, and how a code is split into sub-tokens."""

    tokenizer: str = ""
    """Folder or hub id of the text tokenizer; empty: the base model's, or one trained on the texts and captions."""
    text_vocab_size: Size = 1024
    """Size of a trained text vocabulary."""
    conversations: list[ConversationSourceConfig] = field(default_factory=list)
    """Conversations whose words a trained text vocabulary has too, for `make um3-instruct` later."""
    subtokens: Size = 2
    bits_per_subtoken: Annotated[int, Range(1, 20)] = 14
    prediction: Prediction = "flat"
    """flat: every sub-token has a position; depth: a patch has one, and a small head predicts its sub-tokens."""
    depth_layers: Annotated[int, Range(1, 4)] = 1
    """Layers of that head."""
    bit_embeddings: bool = False
    """During training, add to each visual embedding a learned vector per bit of its code, so that codes share what they
    learn; the sum is folded into plain embeddings when the model is saved."""

    def __post_init__(self) -> None:
        if self.prediction == "depth" and self.subtokens < 2:
            raise ValueError("prediction=depth needs subtokens of 2 or more; set them, or prediction=flat")

    @property
    def depth_head_layers(self) -> int:
        """Layers of the depth head; 0 without one."""
        return self.depth_layers if self.prediction == "depth" else 0


@dataclass
class TextValidationConfig:
    """Measures how much text the model forgets: the loss on validation text, compared with the loss before step 1."""

    every_steps: NonNegativeInt = 0
    """Steps between two measurements; 0: off."""
    num_sequences: PositiveInt = 64
    """Sequences of validation text, as long as those of training, the same number from each source."""
    texts: list[TextSourceConfig] = field(default_factory=list)
    """Text sources whose validation split is measured; empty: data.texts."""
    alarm_above: float | None = None
    """Warn if the loss exceeds the loss before step 1 by this many nats per token; null: never."""


@dataclass
class EvaluateConfig:
    """Evaluation during training, with the metrics of `make eval`."""

    every_steps: NonNegativeInt = 0
    """Steps between two evaluations; 0: off."""
    config: str = "configs/demo.yaml"
    """Experiment whose `eval` section sets the data and the number of samples."""
    parts: list[Literal["language", "captions", "generation"]] = field(default_factory=lambda: ["captions"])


@dataclass
class UM3Config(PhaseConfig):
    """UM3: train the unified model."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, weight_decay=0.1))
    loss: UM3LossConfig = field(default_factory=UM3LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainable: Literal["all", "new_rows"] = "all"
    """new_rows: only the rows of embedding and head that model.base_model lacks are trained. lora.rank above 0 implies
    it, and trains adapters too."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_validation: TextValidationConfig = field(default_factory=TextValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    visual_tokenizer: str = ""
    """QLIP folder or hub id whose codes the model learns, such as runs/demo/stage2/model."""
    image_sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling options for images that differ from the defaults, for generation_config.json: `um3 generate` and `um3
    serve` start from them. temperature, top_p, top_k, min_p, guidance_scale (a scale, or a list of them)."""

    @property
    def freezes_base(self) -> bool:
        """Whether the base model is left as it is."""
        return self.trainable == "new_rows" or self.lora.rank > 0

    def __post_init__(self) -> None:
        if self.freezes_base and not self.model.base_model:
            raise ValueError("lora.rank and trainable=new_rows freeze a trained base; set model.base_model")
        check_intervals(self.loop, text_validation=self.text_validation.every_steps, evaluate=self.evaluate.every_steps)
        Sampling(**as_options(self.image_sampling, where="image_sampling: "))

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that training starts from; other inputs make another run."""
        inputs = {"visual_tokenizer": model_digest(self.visual_tokenizer, made_by="stage2")}
        if is_um3(self.model.base_model):
            inputs["init_from"] = model_digest(self.model.base_model, made_by="um3-init")
        elif base := self.model.base_model:
            hub_id = "" if Path(base).exists() else model_digest(base, made_by="um3-init")
            if self.lora.rank:
                raise UserError(
                    f"lora.rank={self.lora.rank}: adapters need their base as a folder; run `make um3-init` with "
                    f"BASE={base} and set model.base_model to the UM3 that it writes"
                )
            # What is wrong with a folder that exists, the reader of models says better.
            inputs["base_model"] = hub_id or weights_digest(base) or base
        return inputs


@dataclass
class UM3InstructConfig(PhaseConfig):
    """Train a UM3 on conversations; vocabulary, architecture and visual tokenizer are those of `init_from`."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-5, weight_decay=0.0))
    loss: UM3LossConfig = field(default_factory=UM3LossConfig)
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    text_validation: TextValidationConfig = field(default_factory=TextValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    init_from: str = ""
    """UM3 folder or hub id to start from, such as runs/demo/um3/model."""

    def __post_init__(self) -> None:
        check_intervals(self.loop, text_validation=self.text_validation.every_steps, evaluate=self.evaluate.every_steps)

    def inputs(self) -> dict[str, str]:
        """Fingerprint of the model that training starts from; another model makes another run."""
        return {"init_from": model_digest(self.init_from, made_by="um3")}


@dataclass
class UM3InitDataConfig:
    """The texts on which a base's language is measured and an inserted normalisation is distilled."""

    texts: Annotated[list[TextSourceConfig], Range(1)] = field(default_factory=lambda: [TextSourceConfig()])
    seq_len: Annotated[int, Range(8)] = 512
    num_sequences: PositiveInt = 8
    """Sequences of validation text that are measured."""


@dataclass
class UM3InitConfig(PhaseConfig):
    """The model that UM3 starts from: a language model with the image tokens of a visual tokenizer. Only an inserted
    query-key normalisation is trained (`train/recipes/um3_init.py`)."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_steps=40, batch_size=4, log_every_steps=1, save_every_steps=10)
    )
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-4, warmup_steps=5, weight_decay=0.0)
    )
    data: UM3InitDataConfig = field(default_factory=UM3InitDataConfig)
    base_model: str = ""
    """Llama or Qwen language model: a folder, a GGUF file or a hub id."""
    visual_tokenizer: str = ""
    """QLIP folder or hub id."""
    qk_norm: bool = True
    new_token_init: NewTokenInit = "mean"
    subtokens: NonNegativeInt = 0
    bits_per_subtoken: NonNegativeInt = 0
    """How a code becomes tokens; 0: the fewest sub-tokens of equal size, at most 14 bits each."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the saved weights; "base" keeps the base model's."""
    evaluate_every_steps: PositiveInt = 10
    """Steps between two measurements of the divergence from the base; training ends when it has stopped falling."""

    def __post_init__(self) -> None:
        if self.engine.zero_stage == 3:
            raise ValueError("the model shares weights with its base, which ZeRO 3 divides; set engine.zero_stage=2")
        if self.engine.precision == "bf16-true":
            raise ValueError("bf16-true would round the base's weights; set engine.precision=bf16-mixed")

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that it is made from; other inputs make another model."""
        if not self.base_model:
            raise UserError("base_model is empty; set it to a Llama or Qwen (make um3-init BASE=folder or hub id)")
        inputs = {"visual_tokenizer": model_digest(self.visual_tokenizer, made_by="stage2")}
        return inputs | {"base_model": weights_digest(self.base_model) or self.base_model}
