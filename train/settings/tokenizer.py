"""The configs of stages 1 and 2, `Stage1Config` and `Stage2Config`, and their sections."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from data_mix.batches.config import AugmentConfig
from data_mix.sources.image_sources import ImageSourceConfig
from eval.config import PerceptualConfig
from train.config import OptimizerConfig, PhaseConfig, check_intervals
from train.run_folder import model_digest
from um3.core.hub import weights_digest
from um3.core.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Share, Size


def _check_multiples(config: object, **pairs: str) -> None:
    for whole, part in pairs.items():
        if getattr(config, whole) % getattr(config, part):
            values = f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}"
            raise ValueError(f"{values}; change one")


@dataclass
class QLIPSizeConfig:
    """Shape of the tokenizer (SPEC section 1); encoder and decoder have the same width and depth."""

    init_from: str = ""
    """QLIP folder or hub id to start from instead of new weights; the shape is then that model's."""
    encoder_weights: str = ""
    """Weights for the visual encoder: a file of EVA-02's (MIM) or EVA-CLIP's weights (on the hub: OWNER/NAME/FILE),
    or a QLIP folder; empty: new weights."""
    image_size: Size = 256
    patch_size: Size = 16
    hidden_size: Size = 768
    num_layers: Size = 12
    num_heads: Size = 12
    intermediate_size: Size = 2048
    decoder_overlap: Annotated[int, Range(0)] = 0
    """Pixels by which the decoder's output of a patch reaches over each neighbour, blended; 0 as in the paper."""
    quantizer: Literal["bsq", "vq"] = "bsq"
    """bsq: the signs of `bits` numbers. vq: a codebook of 2^bits vectors, the baseline (`codebook` trains it)."""
    bits: Annotated[int, Range(1, 62)] = 28
    code_size: Size = 8
    """Dimensions of a vq's vectors."""
    group_size: Size = 1
    """Bits whose joint entropy a bsq maximises."""
    inv_temperature: PositiveFloat = 1.0
    """Of a bsq's soft code."""
    projection_dim: Size = 512
    rope_pretrained_grid: Size = 16
    initializer_range: NonNegativeFloat = 0.02

    def __post_init__(self) -> None:
        _check_multiples(self, image_size="patch_size", hidden_size="num_heads", bits="group_size")
        if self.decoder_overlap > self.patch_size:
            overlap = f"decoder_overlap {self.decoder_overlap} is larger than patch_size {self.patch_size}"
            raise ValueError(f"{overlap}; set it to an eighth or a quarter of it, or to 0")
        if self.quantizer == "vq" and self.bits > 20:
            raise ValueError(f"quantizer vq with bits={self.bits} needs 2^{self.bits} vectors; set bits to 20 or less")
        if self.quantizer == "vq" and (self.group_size, self.inv_temperature) != (1, 1.0):
            raise ValueError("group_size and inv_temperature belong to quantizer bsq; leave them out for vq")
        if self.hidden_size // self.num_heads % 4:
            raise ValueError(f"hidden_size / num_heads = {self.hidden_size // self.num_heads} is not a multiple of 4")


@dataclass
class TextTowerConfig:
    """Shape of the text tower; CLIP-B's by default."""

    tokenizer: str = ""
    """Folder or hub id of the text tokenizer; empty: train one on the captions of data.sources."""
    weights: str = ""
    """CLIP folder or hub id whose text tower to load; empty: new weights."""
    vocab_size: Size = 49408
    hidden_size: Size = 512
    num_layers: Size = 12
    num_heads: Size = 8
    intermediate_size: Size = 2048
    max_tokens: Annotated[int, Range(2, 2**20)] = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        _check_multiples(self, hidden_size="num_heads")


@dataclass
class ImageDataConfig:
    """The images and captions that train the tokenizer."""

    sources: Annotated[list[ImageSourceConfig], Range(1)] = field(default_factory=list)
    caption: Literal["first", "random"] = "first"
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if streamed := [source.name for source in self.sources if source.stream]:
            reason = "the tokenizer reads images in random order, which a stream does not allow"
            raise ValueError(f"source '{streamed[0]}': {reason}; set stream=0 to download the data set")


@dataclass
class Stage1LossConfig:
    """Weights of stage 1's loss (SPEC section 1)."""

    mse: NonNegativeFloat = 1e3
    """a_r"""
    contrastive: NonNegativeFloat = 1.0
    """a_a"""
    entropy: NonNegativeFloat = 1.0
    """a_q"""
    commitment: NonNegativeFloat = 1.0
    """a_z"""


@dataclass
class CodebookConfig:
    """How stage 1 trains the codebook of a vq."""

    decay: Decay = 0.99
    """Of the running mean of an entry's vectors, per step."""
    revive_below: Share = 0.1
    """An entry that vectors choose less often than this share of the mean is replaced by a vector of the batch."""
    kmeans_iterations: PositiveInt = 10
    """Iterations of the k-means that the codebook starts from."""
    kmeans_vectors: PositiveInt = 8
    """Vectors per entry that it reads, of the first batches."""


@dataclass
class ImageValidationConfig:
    """Measures reconstruction, and in stage 1 the contrastive loss, on validation images while the tokenizer trains."""

    every_steps: NonNegativeInt = 0
    """Steps between two measurements; 0: off."""
    num_images: Annotated[int, Range(2)] = 64
    """Validation images, as many of each source."""


@dataclass
class Stage1Config(PhaseConfig):
    """Stage 1: train the visual tokenizer."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(kind="lamb", grad_clip=5.0))
    loss: Stage1LossConfig = field(default_factory=Stage1LossConfig)
    model: QLIPSizeConfig = field(default_factory=QLIPSizeConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    validation: ImageValidationConfig = field(default_factory=ImageValidationConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    bottleneck: Literal["quantizer", "identity"] = "quantizer"
    """identity: the decoder reads the encoder's output without quantization, and the quantizer does not train (recipe 2
    of Table 3c, Figure 5)."""
    trainable: list[str] = field(default_factory=list)
    """Name prefixes of the parameters to train, as in `optimizer.module_lr`; empty: all."""
    gradient_norms: bool = False
    """Log the gradient norm of each of the two losses in the encoder's last MLP (Figure 5)."""

    def __post_init__(self) -> None:
        check_intervals(self.loop, validation=self.validation.every_steps)
        if self.gradient_norms and self.engine.zero_stage == 3:
            raise ValueError("gradient_norms needs whole weights, not ZeRO 3's; set engine.zero_stage=2 or less")
        uncaptioned = [source.name for source in self.data.sources if not source.has_captions]
        if self.loss.contrastive and uncaptioned:
            reason = "has no captions, which the contrastive loss needs"
            raise ValueError(f"source '{uncaptioned[0]}' {reason}; set loss.contrastive=0")
        if self.model.init_from and (self.model.encoder_weights or self.text.weights):
            raise ValueError("model.init_from loads all weights; unset model.encoder_weights and text.weights")
        if self.text.weights and not self.text.tokenizer:
            raise ValueError("text.weights need their own vocabulary; set text.tokenizer to the same CLIP")

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that training starts from; other inputs make another run."""
        if self.model.init_from:
            return {"init_from": model_digest(self.model.init_from, made_by="stage1")}
        files = {"encoder_weights": self.model.encoder_weights, "text.weights": self.text.weights}
        return {name: weights_digest(path) or path for name, path in files.items() if path}


@dataclass
class Stage2LossConfig:
    """Weights of stage 2's loss (SPEC section 1)."""

    mse: NonNegativeFloat = 1.0
    """a_r"""
    entropy: NonNegativeFloat = 1.0
    """a_q"""
    perceptual: NonNegativeFloat = 0.1
    """a_p"""
    adversarial: NonNegativeFloat = 0.1
    """a_g"""
    adversarial_kind: Literal["hinge", "non_saturating"] = "hinge"
    adversarial_start_step: NonNegativeInt = 0
    """The discriminator trains from step 0; the generator gets the adversarial loss from this step on."""
    r1: NonNegativeFloat = 0.0
    """gamma of the R1 penalty on real images, gamma / 2 * E |grad D|^2 (Mescheder et al. 2018)."""


@dataclass
class DiscriminatorConfig:
    """Shape of the discriminator: PatchGAN, or StyleGAN2's residual one."""

    kind: Literal["patch", "residual"] = "patch"
    channels: Size = 64
    num_layers: Size = 3


@dataclass
class Stage2Config(PhaseConfig):
    """Stage 2: fine-tune the bottleneck and decoder."""

    discriminator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    loss: Stage2LossConfig = field(default_factory=Stage2LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Without the two files: a distance in the features of a seeded random network."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    init_from: str = ""
    """QLIP folder or hub id to start from, such as runs/demo/stage1/model."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    validation: ImageValidationConfig = field(default_factory=ImageValidationConfig)
    trainable: list[str] = field(default_factory=lambda: ["qlip.vision_model.quant_embed", "qlip.vision_decoder"])
    """Name prefixes of the parameters to train, within the bottleneck and the decoder."""

    def __post_init__(self) -> None:
        check_intervals(self.loop, validation=self.validation.every_steps)
        if self.discriminator_optimizer.ema_decay:
            raise ValueError("discriminator_optimizer.ema_decay must be 0: the discriminator is not saved")

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the models that training starts from; other inputs make another run."""
        files = {
            f"perceptual.{name}": weights_digest(path) or path for name, path in vars(self.perceptual).items() if path
        }
        return {"init_from": model_digest(self.init_from, made_by="stage1")} | files
