"""The configs of the three recipes, and when a phase's folder is up to date.

No torch here: a phase that has nothing to do must end at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_mix.batches.config import DataConfig
from data_mix.sources.image_sources import ImageSourceConfig
from data_mix.sources.text import TextSourceConfig
from um3.core.config import differences, load_config, save_config, to_dict
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.files import read_json, sha256_of
from um3.model.configuration import ModelConfig, is_um3


@dataclass
class OptimizerConfig:
    """An optimizer with its schedule (SPEC Tables 8 and 9)."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = 5e-4
    """Peak learning rate of every parameter no entry of `module_lr` names."""
    module_lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate by parameter-name prefix, such as {vision_model.: 2e-4}; the longest match counts."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Applied to weights of two or more dimensions only."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 2000
    final_lr_ratio: float = 0.0
    """The cosine ends at this share of the peak."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which the finished model then holds; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be two numbers in [0, 1)")
        if self.lr <= 0 or self.warmup_steps < 0 or self.grad_clip < 0:
            raise ValueError("lr must be positive, warmup_steps and grad_clip must not be negative")


@dataclass
class EngineConfig:
    """How DeepSpeed runs the model; the same on one CPU process and on many nodes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-true"] = "auto"
    """bf16-true: weights in bf16 with float32 masters. bf16-mixed: float32 weights, bf16 matrix products (autocast).
    auto: bf16-mixed on a GPU, fp32 on a CPU."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (AdamW under ZeRO 1-3, GPU only)."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile (ZeRO 0-2); the first steps take minutes."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """UM3's attention. Over packed rows SDPA has a mask; flash attention (a GPU and flash-attn) needs none."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """On a GPU: torch's fused AdamW, and Liger's kernels in the language model where liger-kernel is installed."""
    bucket_elements: int = 500_000_000
    """Gradients that ZeRO reduces at a time; it holds one or two buffers of this size, never of more than the model."""

    def __post_init__(self) -> None:
        if self.bucket_elements < 1:
            raise ValueError(f"bucket_elements is {self.bucket_elements}; it must be at least 1")


@dataclass
class LoopConfig:
    """The run: where, how long, how often it reports and saves."""

    output_dir: str = ""
    """Folder of this phase, such as runs/demo/stage1."""
    seed: int = 0
    max_steps: int = 1000
    batch_size: int = 128
    """Samples per step over all ranks and accumulation steps."""
    micro_batch_size: int = 0
    """Samples per forward pass and rank; 0 takes a rank's whole share at once."""
    log_every_steps: int = 10
    save_every_steps: int = 500
    keep_checkpoints: int = 2
    """The newest ones that stay."""
    keep_best_by: str = "train/loss"
    """Metric whose lowest mean between two saves marks the best checkpoint, which stays as well; empty: none does."""
    num_threads: int = 0
    """CPU threads per process; 0 leaves torch's choice."""
    loggers: list[str] = field(default_factory=list)
    """Further views of metrics.jsonl: tensorboard, wandb."""

    def is_logged(self, step: int) -> bool:
        """Whether metrics.jsonl has a row of step number `step`, counted from 1."""
        return step % self.log_every_steps == 0 or step in (1, self.max_steps)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 0")
        unknown = set(self.loggers) - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(f"loop.loggers: unknown logger '{unknown.pop()}'; use tensorboard or wandb")


@dataclass
class QLIPSizeConfig:
    """Shape of the tokenizer (SPEC section 1); decoder and encoder have the same width and depth."""

    init_from: str = ""
    """QLIP folder or hub id to start from instead of fresh weights; its own shape then counts."""
    encoder_weights: str = ""
    """File of EVA-02's (MIM) or EVA-CLIP's weights for the visual encoder (on the hub: OWNER/NAME/FILE), or a QLIP
    folder with one to take; empty leaves it fresh."""
    image_size: int = 256
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 2048
    bits: int = 28
    group_size: int = 1
    inv_temperature: float = 1.0
    projection_dim: int = 512
    rope_pretrained_grid: int = 16
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_heads"), ("bits", "group_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}; change one"
                )


@dataclass
class TextTowerConfig:
    """Shape of the text tower; CLIP-B's by default."""

    tokenizer: str = ""
    """Folder or hub id of the text tokenizer; empty trains a small one on the captions at hand."""
    weights: str = ""
    """CLIP folder or hub id for the weights of the tower; empty leaves them fresh."""
    vocab_size: int = 49408
    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    intermediate_size: int = 2048
    max_tokens: int = 77
    hidden_act: str = "quick_gelu"


@dataclass
class ImageDataConfig:
    """Which images and captions the tokenizer sees."""

    sources: list[ImageSourceConfig] = field(default_factory=list)
    caption: Literal["first", "random"] = "first"

    def __post_init__(self) -> None:
        if streamed := [source.name for source in self.sources if source.stream]:
            raise ValueError(f"source '{streamed[0]}': images are drawn in any order here; stream=0 downloads the set")


@dataclass
class Stage1LossConfig:
    """Weights of stage 1's loss (SPEC section 1)."""

    mse: float = 1e3
    """a_r"""
    contrastive: float = 1.0
    """a_a"""
    entropy: float = 1.0
    """a_q"""
    commitment: float = 1.0
    """a_z"""


@dataclass
class Stage1Config:
    """Everything stage 1 can be told."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(kind="lamb", grad_clip=5.0))
    loss: Stage1LossConfig = field(default_factory=Stage1LossConfig)
    model: QLIPSizeConfig = field(default_factory=QLIPSizeConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    bottleneck: Literal["bsq", "identity"] = "bsq"
    """identity: the decoder takes the encoder's output as it is, and the quantizer stays as it was (recipe 2 of Table
    3c, Figure 5)."""
    trainable: list[str] = field(default_factory=list)
    """Prefixes of the parameters that train, as in `optimizer.module_lr`; empty trains all."""
    gradient_norms: bool = False
    """Log the gradient norm of each of the two losses at the encoder's last MLP (Figure 5)."""

    def __post_init__(self) -> None:
        if self.gradient_norms and self.engine.zero_stage == 3:
            raise ValueError("gradient_norms needs whole weights, which ZeRO 3 cuts apart")
        if self.loss.contrastive and (bare := [each.name for each in self.data.sources if not each.has_captions]):
            raise ValueError(
                f"source '{bare[0]}' has no captions, which the contrastive loss needs; set loss.contrastive=0"
            )
        if self.model.init_from and (self.model.encoder_weights or self.text.weights):
            raise ValueError(
                "model.init_from brings all weights; leave model.encoder_weights and text.weights empty with it"
            )
        if self.text.weights and not self.text.tokenizer:
            raise ValueError("text.weights are embeddings of one vocabulary; set text.tokenizer to their own")


@dataclass
class Stage2LossConfig:
    """Weights of stage 2's loss (SPEC section 1)."""

    mse: float = 1.0
    """a_r"""
    entropy: float = 1.0
    """a_q"""
    perceptual: float = 0.1
    """a_p"""
    adversarial: float = 0.1
    """a_g"""
    adversarial_kind: Literal["hinge", "non_saturating"] = "hinge"
    adversarial_start_step: int = 0
    """The discriminator trains from step 0; the generator listens to it from this step."""
    r1: float = 0.0
    """gamma of the discriminator's penalty on real images, gamma / 2 * E |grad D|^2 (Mescheder et al. 2018)."""


@dataclass
class PerceptualConfig:
    """Weights of LPIPS-VGG; both empty means the seeded random-feature distance."""

    backbone: str = ""
    heads: str = ""


@dataclass
class DiscriminatorConfig:
    """Shape of the discriminator: PatchGAN, or StyleGAN2's residual one."""

    kind: Literal["patch", "residual"] = "patch"
    channels: int = 64
    num_layers: int = 3


@dataclass
class Stage2Config:
    """Everything stage 2 can be told."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    loss: Stage2LossConfig = field(default_factory=Stage2LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    init_from: str = ""
    """QLIP folder or hub id that stage 1 left, such as runs/demo/stage1/model."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    trainable: list[str] = field(default_factory=lambda: ["qlip.vision_model.quant_embed", "qlip.vision_decoder"])
    """Prefixes of the parameters that train, as in `optimizer.module_lr`; of bottleneck and decoder only."""

    def __post_init__(self) -> None:
        if self.discriminator_optimizer.ema_decay:
            raise ValueError("discriminator_optimizer.ema_decay: no discriminator is saved, so no average of it")


@dataclass
class UM3LossConfig:
    """The language-model loss (SPEC section 2): split softmax (paper, Eq 6) or joint, for the ablation."""

    mode: Literal["split", "joint"] = "split"
    text_weight: float = 1.0
    visual_weight: float = 1.0
    """Each half's loss is the mean over its own targets of the global batch, times its weight."""
    z_loss: float = 0.0
    chunk_tokens: int = 2048
    """At most so many positions have logits at one time; fewer where these would take more than 256 MiB."""


@dataclass
class VocabularyConfig:
    """Text entries and how a code becomes sub-tokens."""

    tokenizer: str = ""
    """Folder or hub id; empty takes the base model's, or trains one on the texts and captions at hand."""
    text_vocab_size: int = 1024
    """Size of a trained text vocabulary."""
    subtokens: int = 2
    bits_per_subtoken: int = 14
    bit_embeddings: bool = False
    """While training, give each visual row the sum of one vector per bit of its code besides its own row, so that codes
    learn from each other; folded into plain rows when saved."""


@dataclass
class TextValidationConfig:
    """Watches how much text the model forgets: its loss on held-out text against the loss before the first step."""

    every_steps: int = 0
    """Steps between two measurements; 0 for none."""
    num_sequences: int = 64
    """Rows of held-out text, as long as those of training, shared evenly among the sources."""
    texts: list[TextSourceConfig] = field(default_factory=list)
    """Sources whose held-out part is measured; empty takes data.texts."""
    alarm_above: float | None = None
    """Warn where the loss is so many nats per token above that before the first step; null for never."""
    return_above: float | None = None
    """Go back to the mix's start, and calm down anew, where it is so many nats per token above; null for never."""

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise ValueError(f"text_validation.num_sequences={self.num_sequences}; it must be at least 1")


@dataclass
class EvaluateConfig:
    """Evaluation while UM3 trains, as `make eval` does it afterwards."""

    every_steps: int = 0
    """Steps between two evaluations; 0 for none."""
    config: str = "configs/demo.yaml"
    """Experiment whose `eval` section says what is measured, with how many samples."""
    parts: list[Literal["language", "captions", "generation"]] = field(default_factory=lambda: ["captions"])


@dataclass
class UM3Config:
    """Everything the unified model's training can be told."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, weight_decay=0.1))
    loss: UM3LossConfig = field(default_factory=UM3LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_validation: TextValidationConfig = field(default_factory=TextValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    visual_tokenizer: str = ""
    """QLIP folder or hub id whose codes the model learns, such as runs/demo/stage2/model."""

    def __post_init__(self) -> None:
        validation, mix, often = self.text_validation, self.data.mix, self.loop.log_every_steps
        for name, steps in (("text_validation", validation.every_steps), ("evaluate", self.evaluate.every_steps)):
            if steps < 0 or steps % often:
                raise ValueError(
                    f"{name}.every_steps={steps} is no multiple of loop.log_every_steps={often}, so that its "
                    "measurements would not be logged; change one of them, or set 0 for none"
                )
        if validation.return_above is not None and (
            not mix.calm_down_steps or mix.start[0] / sum(mix.start) <= mix.end[0] / sum(mix.end)
        ):
            raise ValueError(
                f"text_validation.return_above={validation.return_above} goes back to data.mix.start, which has no more text than its "
                "end here; give it more, and data.mix.calm_down_steps above 0"
            )


# What may change between the start of a run and its continuation without making it another run.
FREE_KEYS = (
    "loop.log_every_steps",
    "loop.save_every_steps",
    "loop.keep_",
    "loop.num_threads",
    "loop.loggers",
    "text_validation.alarm_above",
    "evaluate.",
)
# Where things lie may change too: what they are is compared by fingerprint.
FREE_FOLDERS = ("loop.output_dir", "model.init_from:", "init_from:", "visual_tokenizer:", "data.codes:")
FREE_PREFIXES = ("loop.micro_batch_size", "engine.", *FREE_FOLDERS)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that make `new` another run than `old`, as `key: old -> new` lines."""
    lines = differences(old, new)
    return [line for line in lines if not line.startswith((*FREE_KEYS, *FREE_PREFIXES))]


def is_done(config: Any, *, inputs: dict[str, str] | None = None) -> bool:
    """True if the phase's folder holds the finished result of this very config and these inputs.

    Args:
        config: the recipe's config, with a `loop` section.
        inputs: fingerprints of what the phase was made from.

    Raises:
        UserError: the folder belongs to a run with other settings or other inputs.
    """
    folder = Path(config.loop.output_dir)
    started = folder / "config.yaml"
    if started.exists():
        old = to_dict(load_config(type(config), path=started))
        changed = changed_settings(old, to_dict(config))
        if changed:
            raise UserError(
                f"{folder} was made with other settings "
                f"({'; '.join(changed[:3])}{'; ...' if len(changed) > 3 else ''}); "
                "use another RUN=, or delete that folder to train anew"
            )
    done_path = folder / "done.json"
    if not done_path.exists():
        return False
    old_inputs = read_json(done_path)["inputs"]
    if inputs is not None and old_inputs != inputs:
        raise UserError(
            f"{folder} was made from other inputs ({old_inputs} -> {inputs}); delete that folder to train anew"
        )
    return True


def start_folder(config: Any) -> Path:
    """Create the phase's folder with its resolved config.yaml."""
    folder = Path(config.loop.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_main() and not (folder / "config.yaml").exists():
        save_config(config, folder / "config.yaml")
    return folder


def inputs_of(config: Any) -> dict[str, str]:
    """Fingerprints of what the phase is made from; changed inputs make it another run.

    Raises:
        UserError: an earlier phase has not been run.
    """
    if isinstance(config, Stage1Config) and config.model.init_from:
        return {"init_from": folder_digest(config.model.init_from, made_by="stage1")}
    if isinstance(config, Stage2Config):
        return {"init_from": folder_digest(config.init_from, made_by="stage1")}
    if isinstance(config, UM3Config):
        start = (
            {"init_from": folder_digest(config.model.base_model, made_by="um3-init")}
            if is_um3(config.model.base_model)
            else {}
        )
        return {"visual_tokenizer": folder_digest(config.visual_tokenizer, made_by="stage2")} | start
    return {}


def folder_digest(path: str, *, made_by: str) -> str:
    """sha256 of a local model folder's weights file; a hub id stands for itself.

    Raises:
        UserError: the folder is not there.
    """
    weights = Path(path) / "model.safetensors"
    if weights.exists():
        return sha256_of(weights)[:16]
    looks_local = path.startswith((".", "/", "runs")) or Path(path).exists() or path.count("/") > 1
    if not path or looks_local:
        raise UserError(
            f"{path or 'the model to start from'} is not there; run `make {made_by}` first, or give a folder or hub id"
        )
    return path
