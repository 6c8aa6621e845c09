"""`python -m eval coco-captions model=FOLDER references=FILE images=FOLDER`: captions of images, against references.

`references` is Karpathy's dataset_coco.json, a hub set of that split, or anything else that `eval.benchmarks.references` reads.
The model captions each image once, resumable and shared over ranks; or a file does: `captions=FILE` in COCO's result
form ([{"image_id", "caption"}]) or with {"file", "caption"} a line.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.references import Referenced, read_references
from eval.command import LeftOut, folder_sha256, run_command, write_result
from eval.records import Judge, image_name, judge_name, judgements, supplied
from eval.scores import Measurement
from um3.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "the image's codes, no words"
STYLE = "as in training; white space collapsed"
KEPT = 64  # captions that stay in the result to look at


@dataclass
class CocoCaptionsConfig:
    """Which images, who describes them, and how. COCO-Karpathy's test split has 5,000 images with 5 captions each."""

    references: str = ""
    images: str = ""
    """Folder of the images; by default they lie beside the references."""
    split: str = "test"
    limit: int = 0
    """Images to caption, from the front; 0 for all. CIDEr compares over equal sets only."""
    model: str = ""
    """Folder of a trained UM3."""
    captions: str = ""
    """Captions from elsewhere in the place of `model`."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    batch_size: int = 64
    meteor: bool = False
    """Needs Java."""
    out: str = ""
    """File of the result."""

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("set references=FILE, such as Karpathy's dataset_coco.json")
        if bool(self.model) == bool(self.captions):
            raise ValueError("set either model=FOLDER of a trained UM3 or captions=FILE")
        if not self.out:
            raise ValueError("set out=FILE.json for the result")

    def decoding(self) -> dict[str, Any]:
        """Everything besides model, image and seed that a caption depends on."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature}, top-p {self.top_p}"
        return {"prompt": PROMPT, "style": STYLE, "decoding": how, "max_new_tokens": self.max_new_tokens}


def main(arguments: Sequence[str]) -> None:
    """Caption and score."""
    about = "Captions of images against references: BLEU, METEOR, ROUGE-L, CIDEr."
    run_command(CocoCaptionsConfig, coco_captions, name="coco-captions", about=about, arguments=arguments)


def coco_captions(config: CocoCaptionsConfig) -> None:
    """Caption what has no caption yet, score, write the rows.

    Raises:
        UserError: no such model, references or captions.
    """
    from eval.metrics.captions import caption_scores

    began, left_out = time.monotonic(), LeftOut()
    if config.model and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"no UM3 model in {config.model}; run make um3 first, or set model=FOLDER")
    images = read_references(
        config.references, images=config.images, split=config.split, limit=config.limit, left_out=left_out
    )
    protocol: dict[str, Any] = {"split": config.split}
    if config.model:
        protocol, pins = protocol | config.decoding(), {"model_sha256": folder_sha256(config.model)}
        found = write_captions(config, images=images, left_out=left_out)
        if found is None:
            return None
    else:
        protocol, pins = protocol | {"captions": "supplied"}, {"captions_sha256": image_name(Path(config.captions))}
        found = read_captions(config.captions, images=images, left_out=left_out)
    scored = [each for each in images if each.name in found]
    captions = [found[each.name] for each in scored]
    references = [each.references for each in scored]
    of = Measurement("coco_captions", config.seed, protocol)
    rows = caption_scores(
        captions,
        references=references,
        of=of,
        skipped=left_out.count,
        meteor=config.meteor,
        left_out=left_out.note(),
    )
    samples = [
        {"file": each.name, "caption": caption, "references": each.references}
        for each, caption in list(zip(scored, captions, strict=True))[:KEPT]
    ]
    common: dict[str, Any] = {"left_out": left_out, "began": began, "pins": pins}
    return write_result(config.out, rows, config=config, samples=samples, **common)


def write_captions(
    config: CocoCaptionsConfig, *, images: Sequence[Referenced], left_out: LeftOut
) -> dict[str, str] | None:
    """The model's caption of every readable image; None on all ranks but the first."""
    return judgements(
        {each.name: each.image for each in images},
        stem=Path(config.out).with_suffix(".captions"),
        made_by=judge_name(folder_sha256(config.model), config.decoding(), config.seed if config.temperature else 0),
        open_judge=lambda: _open_model(config),
        label="caption images",
        left_out=left_out,
        batch_size=config.batch_size,
    )


def _open_model(config: CocoCaptionsConfig) -> Judge:
    from transformers.utils.logging import disable_progress_bar

    from um3.core.distributed import device
    from um3.core.seeds import derive_seed
    from um3.inference.pipeline import UM3Pipeline

    disable_progress_bar()
    pipeline = UM3Pipeline.from_pretrained(config.model, device=device())
    options: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
    options |= {"max_new_tokens": config.max_new_tokens}

    def caption(files: Sequence[str], images: "Sequence[Image.Image]") -> list[str]:
        # Of each image's name, so that its random numbers are its own wherever a run was stopped.
        seeds = [derive_seed(config.seed, "caption", file) for file in files]
        return list(pipeline.caption(images, seeds=seeds, batch_size=config.batch_size, **options))

    return caption


def read_captions(path: str, *, images: Sequence[Referenced], left_out: LeftOut) -> dict[str, str]:
    """Captions from a file by the images' names: {"file", "caption"} a line, or COCO's list of results.

    Raises:
        UserError: no such file, or one of neither form.
    """
    names = [each.name for each in images]
    if not path.endswith(".json"):
        return supplied(path, field="caption", files=names, left_out=left_out)
    try:
        results = json.loads(Path(path).read_bytes())
        found = {str(each.get("image_id", each.get("file"))): str(each["caption"]) for each in results}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        form = '[{"image_id": ..., "caption": ...}, ...]'
        raise UserError(f"{path} cannot be read as {form} ({type(error).__name__}: {error})") from None
    captions = {each.name: _caption_of(each, found) for each in images}
    for name in [name for name, caption in captions.items() if caption is None]:
        left_out.add("no caption supplied", name)
    return {name: caption for name, caption in captions.items() if caption is not None}


def _caption_of(image: Referenced, found: Mapping[str, str]) -> str | None:
    return found.get(image.name, found.get(image.image_id))
