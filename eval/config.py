"""What to evaluate, with how many samples of what. The defaults are the paper's sizes and settings."""

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from data_mix.sources.image_sources import ImageSourceConfig
from data_mix.sources.text import TextSourceConfig

PartName = Literal["language", "captions", "generation", "tokenizer"]
PARTS: tuple[PartName, ...] = get_args(PartName)
FeatureName = Literal["random-features", "qlip-features", "inception-2015"]
Preprocessing = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
"""How images come to Inception (`eval.metrics.inception`)."""
STAGES = ("stage1", "stage2")
KEPT_BESIDE = ("original", "flipped")
"""Pictures that are kept beside the reconstructions of each tokenizer."""
MAX_PROBE_LR = 1e6  # far beyond any use; float32 overflows far above it


@dataclass
class LanguageConfig:
    """lm-eval tasks. `benchmarks`: folder with local copies of the paper's five tasks, LM_EVAL_DATA by default."""

    num_items: int = 1000
    num_documents: int = 200
    benchmarks: str = field(default_factory=lambda: os.environ.get("LM_EVAL_DATA", ""))
    limit: int | None = None
    """Items of each benchmark to score; null for all."""
    max_tokens: int = 0
    """Longest context; 0 for the model's own. A model trained on short rows has seen no later positions."""
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"language.limit is {self.limit}; it must be at least 1, or null for all items")
        if self.batch_size < 1 or self.max_tokens < 0:
            raise ValueError(
                f"language: batches of {self.batch_size} and contexts of {self.max_tokens} tokens; use 1 or more in a "
                "batch, and 0 tokens for the model's own context"
            )


@dataclass
class CaptionsConfig:
    """Captions of held-out images, `num_images` of each source (COCO-Karpathy test has 5,000)."""

    num_images: int = 5000
    max_new_tokens: int = 64
    batch_size: int = 64
    meteor: bool = False
    """Needs Java."""


@dataclass
class SamplingConfig:
    """How images are drawn: the paper's temperature and top-p (Table 9); a guidance scale of 1 is no guidance."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    guidance_scale: float = 1.0
    batch_size: int = 64

    def protocol(self) -> dict[str, float]:
        """What two drawings must share to be comparable."""
        settings = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return settings | {"guidance_scale": self.guidance_scale}


@dataclass
class GenerationConfig:
    """Images for held-out captions (`num_images` of each source), and `per_skill` for each skill of the checker."""

    num_images: int = 30_000
    per_skill: int = 100
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clip: str = ""
    """Folder of an OpenAI CLIP for `clipscore`; without it only `clipscore_qlip` is measured."""


@dataclass
class LabelledConfig:
    """Images of your own with classes: PATH/val/CLASS/IMAGE, and PATH/train/CLASS/IMAGE for the linear probe; or, with
    `label_column`, parquet, WebDataset shards or a hub set (val is kept by hash where these do not name it)."""

    path: str = ""
    name: str = "labelled"
    label_column: str = ""
    """Where a table or WebDataset has the class (a name or a number): a column, "cls" or a field of its json."""
    class_names: str = ""
    """File with a class's name a line, in the order of the folders, names or numbers; empty takes these themselves."""
    templates: str = ""
    """File with a sentence a line, {} for the name; empty takes "a photo of a {}."."""


@dataclass
class ProbeConfig:
    """The linear probe. `adamw` is the paper's recipe (Table 11); `logistic` is a regression solved to its end, without
    the other settings, in float64 with all features in memory."""

    kind: Literal["adamw", "logistic"] = "adamw"
    lr: float = 0.2
    epochs: int = 10
    warmup_epochs: int = 1
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.lr <= MAX_PROBE_LR:
            raise ValueError(f"tokenizer.probe.lr is {self.lr}; it must be above 0 and at most {MAX_PROBE_LR:g}")
        if self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"tokenizer.probe: {self.epochs} epochs of batches of {self.batch_size}, {self.warmup_epochs} of them "
                "warm-up; it needs at least one epoch that is no warm-up, and batches of 1 or more"
            )


@dataclass
class PerceptualConfig:
    """The two published files of LPIPS-VGG; both empty leaves `lpips` without a value."""

    backbone: str = ""
    heads: str = ""


@dataclass
class TokenizerConfig:
    """Reconstruction and retrieval on held-out images, classification on images with classes."""

    num_images: int = 50_000
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    others: dict[str, str] = field(default_factory=dict)
    """Tokenizers of your own to measure beside QLIP: name -> package.module:function on your Python path, which returns
    a `tokenizer.images.ImageTokenizer`."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    labelled: bool = True
    """Zero-shot accuracy and linear probe on the digits."""
    classification: list[LabelledConfig] = field(default_factory=list)
    """The same on folders of your own, such as ImageNet's."""
    stages: dict[str, str] = field(default_factory=dict)
    """Tokenizer folders by name; empty for stage1 and stage2 of the run."""

    def __post_init__(self) -> None:
        names = [own.name for own in self.classification] + ["digits"] * self.labelled
        if len(set(names)) < len(names) or not all(own.path for own in self.classification):
            raise ValueError(f"tokenizer.classification {names}: each needs a path, and a name of its own")
        if taken := {*(self.stages or STAGES), *KEPT_BESIDE} & self.others.keys():
            raise ValueError(f"tokenizer.others: '{min(taken)}' is taken; choose another name")


@dataclass
class EvalConfig:
    """One evaluation. `run` is the run's folder; what is read and written lies in it unless said otherwise."""

    run: str = ""
    model: str = ""
    """Folder of the UM3 model; RUN/um3/model by default. Language takes any language model, also by its hub id."""
    out: str = ""
    """Folder for the results; RUN/eval by default."""
    parts: list[PartName] = field(default_factory=lambda: list(PARTS))
    images: list[ImageSourceConfig] = field(default_factory=list)
    """Their validation images are used; empty for the sources the run's stage 1 was trained on. Those without captions
    serve the tokenizer part alone."""
    texts: list[TextSourceConfig] = field(default_factory=list)
    """Their validation documents are used; empty for the sources the run's UM3 was trained on."""
    seed: int = 0
    num_threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    fid_features: FeatureName = "random-features"
    """Feature network of Frechet distances; only over inception-2015 they are FID."""
    inception_weights: str = ""
    force: bool = False
    """Measure again what is up to date."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    @property
    def captioned(self) -> list[ImageSourceConfig]:
        """The image sources with captions."""
        return [source for source in self.images if source.has_captions]

    def __post_init__(self) -> None:
        least = {
            "language.num_items": self.language.num_items,
            "language.num_documents": self.language.num_documents,
            "captions.num_images": self.captions.num_images,
            "generation.num_images": self.generation.num_images,
            "generation.per_skill": self.generation.per_skill,
            "tokenizer.num_images": self.tokenizer.num_images,
        }
        for name, value in least.items():
            if value < 2:
                raise ValueError(f"{name} is {value}; it must be at least 2")
