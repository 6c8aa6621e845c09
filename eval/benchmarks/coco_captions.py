"""`python -m eval coco-captions model=FOLDER references=FILE images=FOLDER output=FILE.json`: caption metrics.

`references` is Karpathy's dataset_coco.json, a hub set of that split, or another form that `eval.benchmarks.references`
lists. The model captions every image once; a killed run resumes, and the ranks of a torchrun share the images.
`captions=FILE` scores captions from elsewhere: COCO's result form ([{"image_id", "caption"}]), or a .jsonl of objects
with "file" and "caption".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.references import read_references
from eval.command import model_hash, run_command
from eval.config import TopP
from eval.results_cache import ImageModel
from eval.scores import Measurement
from um3.core.distributed import is_main
from um3.core.hub import model_folder
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "the image's codes, without text"
STYLE = "as in training; white space collapsed"
NUM_SAMPLES = 64  # captions that the result file shows


@dataclass
class CocoCaptionsConfig:
    """The images, the captioner and its decoding. COCO-Karpathy's test split has 5,000 images with 5 captions each."""

    references: str = ""
    images: str = ""
    """Folder of the images; the folder of `references` by default."""
    split: str = "test"
    limit: NonNegativeInt = 0
    """Number of images to caption, in the order of the file; 0 for all. CIDEr values compare over equal sets only."""
    model: str = ""
    """Folder or hub id of a trained UM3."""
    captions: str = ""
    """File of captions to score instead of captions by `model`."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy decoding."""
    top_p: TopP = 1.0
    max_new_tokens: PositiveInt = 64
    seed: int = 0
    batch_size: PositiveInt = 64
    meteor: bool = False
    """Compute METEOR, which needs Java."""
    output: str = ""
    """Result file (JSON)."""

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("set references=FILE, such as Karpathy's dataset_coco.json")
        if bool(self.model) == bool(self.captions):
            raise ValueError("set either model=FOLDER of a trained UM3 or captions=FILE")
        if not self.output:
            raise ValueError("set output=FILE.json for the result")

    def decoding(self) -> dict[str, Any]:
        """Everything besides model, image and seed that a caption depends on."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature}, top-p {self.top_p}"
        return {"prompt": PROMPT, "style": STYLE, "decoding": how, "max_new_tokens": self.max_new_tokens}


def main(arguments: Sequence[str]) -> None:
    """Caption images and score the captions."""
    about = "Captions of images against references: BLEU, METEOR, ROUGE-L, CIDEr."
    run_command(CocoCaptionsConfig, coco_captions, name="coco-captions", about=about, arguments=arguments)


def coco_captions(config: CocoCaptionsConfig) -> None:
    """Caption the images that have no caption yet, score all captions, and write the scores."""
    from eval.metrics.captions import caption_scores

    model = model_hash(model_folder(config.model, kind="UM3 model")) if config.model else ""
    benchmark = Benchmark(config, Measurement("coco_captions", config.seed, {"split": config.split}))
    skipped = benchmark.skipped
    chosen: Any = {"images": config.images, "split": config.split, "limit": config.limit}
    images, decoding = read_references(config.references, skipped=skipped, **chosen), config.decoding()
    benchmark.add_protocol(**(decoding if model else {"captions": "supplied"}))
    benchmark.pins |= {"model_sha256": model} if model else {}
    captions = benchmark.results(
        {image.name: image.image for image in images},
        protocol=[model, decoding, config.seed if config.temperature else 0],
        open_model=lambda: _open_model(config),
        label="caption images",
        batch_size=config.batch_size,
        supplied=config.captions,
        field="caption",
        ids={image.name: image.image_id for image in images},
    )
    if not is_main():
        return
    scored = [image for image in images if image.name in captions]
    texts, references = [captions[image.name] for image in scored], [image.references for image in scored]
    missed: Any = {"skipped": skipped.count, "note": skipped.note()}
    scores = caption_scores(texts, references=references, of=benchmark.measurement, meteor=config.meteor, **missed)
    shown = zip(scored[:NUM_SAMPLES], texts, references, strict=False)
    samples = [{"file": image.name, "caption": text, "references": known} for image, text, known in shown]
    benchmark.write(scores, samples=samples)


def _open_model(config: CocoCaptionsConfig) -> ImageModel:
    from transformers.utils.logging import disable_progress_bar

    from um3.core.distributed import device
    from um3.core.seeds import sample_seed
    from um3.inference.pipeline import UM3Pipeline

    disable_progress_bar()
    pipeline = UM3Pipeline.from_pretrained(config.model, device=device())
    decoding = ("temperature", "top_p", "max_new_tokens", "batch_size")
    options: dict[str, Any] = {name: getattr(config, name) for name in decoding}

    def caption(names: Sequence[str], images: "Sequence[Image.Image]") -> list[str]:
        seeds = [sample_seed(config.seed, "caption", name) for name in names]
        return list(pipeline.caption(images, seeds=seeds, **options))

    return caption
