"""How well images fit their prompts: the mean cosine of image and text embedding.

`clipscore_qlip` uses the towers of the tokenizer itself; `clipscore`, the number of the literature, needs an OpenAI
CLIP. It is the raw mean, as the paper reports it; the same cosines by the two other conventions stand beside it:

    clipscore_100    100 max(mean, 0), as torchmetrics prints it
    clipscore_2.5    the mean of 2.5 max(cosine, 0), the definition of Hessel et al. 2021

Some put "A photo depicts " in front of every text (Hessel et al., LlamaGen): a setting, recorded with the score.

Shapes: N images with one text each, D embedding dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eval.command import folder_sha256
from eval.paper_values import UM3
from eval.scores import Measurement, Score
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.inference.pipeline import UM3Pipeline

BATCH = 64


def no_text_note(processor: QLIPProcessor) -> str:
    """Why nothing can be compared with text; empty when it can."""
    try:
        processor.text_tokenizer  # noqa: B018 (reading it is the question)
    except UserError as error:
        return str(error)
    return ""


class Clip(NamedTuple):
    """An OpenAI CLIP and where it came from."""

    model: Any
    text_tokenizer: Any
    processor: Any
    name: str


def load_clip(name: str) -> Clip:
    """Load the CLIP in the folder, or of the hub name, `name`.

    Raises:
        UserError: no CLIP there.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip import CLIPImageProcessorPil

    try:
        model = CLIPModel.from_pretrained(name).eval()
        text_tokenizer, processor = AutoTokenizer.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"no CLIP at '{name}' ({reason}); give the folder of openai/clip-vit-base-patch32") from None
    return Clip(model.to(device()), text_tokenizer, processor, name)


@torch.no_grad()
def clip_cosines(
    images: NDArray | Sequence[Image.Image], *, texts: Sequence[str], clip: Clip, prefix: str = ""
) -> Tensor:
    """Cosine (N,) of every image, uint8 (N, H, W, 3) or Pillow's, with `prefix` and its text; a text too long for CLIP
    is cut, its end token kept."""
    limit, cosines = clip.model.config.text_config.max_position_embeddings, []
    for start in range(0, len(texts), BATCH):
        batch = images[start : start + BATCH]
        pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in batch]
        words = clip.text_tokenizer(
            [prefix + text for text in texts[start : start + BATCH]],
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        pixels = clip.processor(pictures, return_tensors="pt")["pixel_values"]
        output = clip.model(**words.to(clip.model.device), pixel_values=pixels.to(clip.model.device))
        images_BD, texts_BD = F.normalize(output.image_embeds, dim=1), F.normalize(output.text_embeds, dim=1)
        cosines.append((images_BD * texts_BD).sum(dim=1).cpu())
    return torch.cat(cosines)


def clip_conventions(cosines_N: Tensor, *, of: Measurement, **fields: Any) -> list[Score]:
    """The three rows of cosines with an OpenAI CLIP."""
    raw = of.mean("clipscore", cosines_N.tolist(), paper=UM3["clipscore"], **fields)
    hundredfold = of.score("clipscore_100", 100 * max(raw.value or 0.0, 0.0), n=raw.n, **fields)
    return [raw, hundredfold, of.mean("clipscore_2.5", (2.5 * cosines_N.clamp(min=0)).tolist(), **fields)]


def missing_clip(of: Measurement, *, setting: str) -> Score:
    """The row in their place where there is no CLIP."""
    note = f"needs an OpenAI CLIP; set {setting} to openai/clip-vit-base-patch32 or its folder"
    return of.missing("clipscore", note=note, paper=UM3["clipscore"])


def clipscore_rows(
    images_NHWC: NDArray,
    *,
    texts: Sequence[str],
    originals_NHWC: NDArray,
    pipeline: UM3Pipeline,
    clip: Clip | None,
    of: Measurement,
) -> list[Score]:
    """CLIPScores of drawn images; those of the real images with the same captions stand beside, as what to aim at."""
    if clip is None:
        rows = [missing_clip(of, setting="generation.clip")]
    else:
        towers = of.with_protocol(towers=folder_sha256(clip.name), prefix="")
        rows = clip_conventions(clip_cosines(images_NHWC, texts=texts, clip=clip), of=towers)
    if note := no_text_note(pipeline.processor):
        return [*rows, of.missing("clipscore_qlip", note=note), of.missing("clipscore_qlip_real", note=note)]
    drawn, real = pipeline.fits(images_NHWC, texts), pipeline.fits(originals_NHWC, texts)
    own = of.with_protocol(towers="qlip", fingerprint=pipeline.qlip.fingerprint()[:12])
    return [
        *rows,
        own.mean("clipscore_qlip", drawn, note="by the tokenizer's own towers, not CLIP's"),
        own.mean("clipscore_qlip_real", real, note="the real images with these captions"),
    ]
