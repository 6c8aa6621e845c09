"""The settings of an evaluation. The defaults are the paper's sizes and settings."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from data_mix.sources.config import ImageSourceConfig, TextSourceConfig
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range

PartName = Literal["language", "captions", "generation", "tokenizer"]
PARTS: tuple[PartName, ...] = get_args(PartName)
FeatureName = Literal["random-features", "qlip-features", "inception-2015"]
Preprocessing = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
"""How images are resized for Inception (`eval.metrics.inception`)."""
STAGES = ("stage1", "stage2")
RESERVED_NAMES = ("original", "flipped")
"""Names of image arrays that are stored beside the reconstructions of each tokenizer."""
AtLeastTwo = Annotated[int, Range(2)]
TopP = Annotated[float, Range(maximum=1, above=0)]


@dataclass
class LanguageConfig:
    """The paper's five language tasks, run by lm-eval, and a cloze and the bits per byte of validation text."""

    num_items: AtLeastTwo = 1000
    """Items of the cloze."""
    num_documents: AtLeastTwo = 200
    """Documents for the bits per byte."""
    benchmarks: str = field(default_factory=lambda: os.environ.get("LM_EVAL_DATA", ""))
    """Folder with local copies of the five tasks; the environment variable LM_EVAL_DATA by default."""
    limit: PositiveInt | None = None
    """Items to score of each of the five tasks; null for all."""
    max_tokens: NonNegativeInt = 0
    """Longest context; 0 for the model's own. A model trained on short sequences never saw later positions."""
    batch_size: PositiveInt = 16


@dataclass
class CaptionsConfig:
    """Captions of validation images."""

    num_images: AtLeastTwo = 5000
    """Images of each source; COCO-Karpathy test has 5,000."""
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 64
    meteor: bool = False
    """Compute METEOR, which needs Java."""


@dataclass
class SamplingConfig:
    """How images are sampled: the paper's temperature and top-p (Table 9). A guidance scale of 1 is no guidance."""

    temperature: NonNegativeFloat = 1.0
    top_p: TopP = 0.95
    top_k: NonNegativeInt = 0
    guidance_scale: Annotated[float, Range(0, 1000)] = 1.0
    batch_size: PositiveInt = 64

    def protocol(self) -> dict[str, Any]:
        """The settings that change the images: all but the batch size."""
        return {key: value for key, value in vars(self).items() if key != "batch_size"}


@dataclass
class GenerationConfig:
    """Images generated for validation captions, and for the prompts of the six skills."""

    num_images: AtLeastTwo = 30_000
    """Images for each source."""
    per_skill: AtLeastTwo = 100
    """Prompts of each skill."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clip: str = ""
    """Folder or hub id of an OpenAI CLIP, for `clipscore`; without it only `clipscore_qlip` is computed."""
    judge: str = ""
    """Folder or hub id of a QLIP for `clipscore_judge`: one judge for models that draw with different tokenizers."""


@dataclass
class ClassificationConfig:
    """A classification data set: PATH/val/CLASS/IMAGE, and PATH/train/CLASS/IMAGE for the linear probe.

    With `label_column`: parquet, WebDataset shards or a hub set. Without a val split there, val is chosen by hash.
    """

    path: str = ""
    name: str = "labelled"
    label_column: str = ""
    """The column with the class (a name or a number); for WebDataset "cls" or a field of the sample's JSON."""
    class_names: str = ""
    """File with one class name per line, in the order of the classes; empty uses the folders' names or the labels."""
    templates: str = ""
    """File with one prompt per line, {} for the class name; empty uses "a photo of a {}."."""


@dataclass
class ProbeConfig:
    """The linear probe. `adamw` is the paper's recipe (Table 11).

    `logistic` is a logistic regression solved to convergence. It ignores the other settings and holds all features in
    memory in float64.
    """

    kind: Literal["adamw", "logistic"] = "adamw"
    lr: Annotated[float, Range(maximum=1e6, above=0)] = 0.2  # float32 overflows far above it
    epochs: PositiveInt = 10
    warmup_epochs: NonNegativeInt = 1
    batch_size: PositiveInt = 1024

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"tokenizer.probe.warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}"
            )


@dataclass
class PerceptualConfig:
    """The two published files of LPIPS-VGG; without them `lpips` has no value."""

    backbone: str = ""
    heads: str = ""


@dataclass
class TokenizerConfig:
    """Reconstruction and retrieval on validation images, and classification."""

    num_images: AtLeastTwo = 50_000
    """Images of each source."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    external: dict[str, str] = field(default_factory=dict)
    """Tokenizers to measure beside QLIP: name -> package.module:function on the Python path.

    The function returns a `tokenizer.images.ImageTokenizer`.
    """
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    digits: bool = True
    """Zero-shot accuracy and linear probe on scikit-learn's digits, if the images are the demo's."""
    classification: list[ClassificationConfig] = field(default_factory=list)
    """The same on other data sets, such as ImageNet."""
    stages: dict[str, str] = field(default_factory=dict)
    """Tokenizer folders by name; empty for stage1 and stage2 of the run."""

    def __post_init__(self) -> None:
        names = [data.name for data in self.classification] + ["digits"] * self.digits
        if len(set(names)) < len(names) or not all(data.path for data in self.classification):
            raise ValueError(f"tokenizer.classification: {names}; each data set needs a path and a unique name")
        if taken := {*(self.stages or STAGES), *RESERVED_NAMES} & self.external.keys():
            raise ValueError(f"tokenizer.external: the name '{min(taken)}' is reserved; use another name")
        if wrong := [name for name in self.stages if name in RESERVED_NAMES or "/" in name]:
            raise ValueError(f"tokenizer.stages: the name '{wrong[0]}' is reserved or has a '/'; use another name")


@dataclass
class EvalConfig:
    """One evaluation of a run folder, or of a model."""

    run: str = ""
    """The run folder; the default for everything that is read and written."""
    model: str = ""
    """Folder of the UM3; RUN/um3/model by default. The language part accepts any language model, also a hub id."""
    output_dir: str = ""
    """Folder for the results; RUN/eval by default."""
    parts: list[PartName] = field(default_factory=lambda: list(PARTS))
    images: list[ImageSourceConfig] = field(default_factory=list)
    """Sources whose validation images are used; by default those of the run's stage 1. Sources without captions are
    used by the tokenizer part only."""
    texts: list[TextSourceConfig] = field(default_factory=list)
    """Sources whose validation documents are used; by default those of the run's UM3."""
    seed: int = 0
    num_threads: NonNegativeInt = 0
    """CPU threads; 0 for torch's default."""
    fid_features: FeatureName = "random-features"
    """Feature network of Frechet distances; only inception-2015 gives the FID."""
    inception_weights: str = ""
    """The published file; empty for torch.hub's cache."""
    force: bool = False
    """Evaluate parts again that are up to date."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    @property
    def results_dir(self) -> Path:
        """Where the results are written."""
        return Path(self.output_dir) if self.output_dir else Path(self.run) / "eval"

    @property
    def captioned(self) -> list[ImageSourceConfig]:
        """The image sources with captions."""
        return [source for source in self.images if source.has_captions]
