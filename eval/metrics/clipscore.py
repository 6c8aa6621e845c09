"""CLIPScore: how well images fit their prompts, as the mean cosine of image and text embedding.

`clipscore_qlip` uses the towers of the tokenizer itself. `clipscore`, the number in the literature, needs an OpenAI
CLIP; it is the plain mean, as in the paper. Two rows give the same cosines by the other conventions:

    clipscore_100    100 max(mean, 0), as torchmetrics prints it
    clipscore_2.5    the mean of 2.5 max(cosine, 0), the definition of Hessel et al. 2021

Hessel et al. and LlamaGen put "A photo depicts " in front of every text. That prefix is an option, recorded with the
score.

Shapes: N images with one text each, D embedding dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eval.paper_values import UM3
from eval.scores import Measurement, Score
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.hub import load_pretrained

BATCH = 64


def no_text_note(processor: QLIPProcessor) -> str:
    """The reason why images cannot be compared with text, or an empty string."""
    try:
        processor.text_tokenizer  # noqa: B018 (the property raises)
    except UserError as error:
        return str(error)
    return ""


class Clip(NamedTuple):
    """An OpenAI CLIP with its text tokenizer and image processor; `name` is its folder or hub id."""

    model: Any
    text_tokenizer: Any
    processor: Any
    name: str


def load_clip(name: str) -> Clip:
    """Load a CLIP from a folder or hub id; UserError if there is none."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip import CLIPImageProcessorPil

    model, text_tokenizer, processor = (
        load_pretrained(loader, name, kind="CLIP", remedy="give the folder of openai/clip-vit-base-patch32")
        for loader in (CLIPModel, AutoTokenizer, CLIPImageProcessorPil)
    )
    return Clip(model.eval().to(device()), text_tokenizer, processor, name)


@torch.no_grad()
def clip_cosines(
    images: NDArray | Sequence[Image.Image], *, texts: Sequence[str], clip: Clip, prefix: str = ""
) -> Tensor:
    """Cosine (N,) of every image, uint8 (N, H, W, 3) or Pillow's, with `prefix` and its text.

    A text longer than CLIP's context is truncated before its end token.
    """
    max_tokens, cosines = clip.model.config.text_config.max_position_embeddings, []
    for start in range(0, len(texts), BATCH):
        batch = images[start : start + BATCH]
        pil_images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in batch]
        prefixed = [prefix + text for text in texts[start : start + BATCH]]
        options = {"padding": True, "truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
        tokens = clip.text_tokenizer(prefixed, **options)
        pixels = clip.processor(pil_images, return_tensors="pt")["pixel_values"]
        output = clip.model(**tokens.to(clip.model.device), pixel_values=pixels.to(clip.model.device))
        images_BD, texts_BD = F.normalize(output.image_embeds, dim=1), F.normalize(output.text_embeds, dim=1)
        cosines.append((images_BD * texts_BD).sum(dim=1).cpu())
    return torch.cat(cosines)


def clip_conventions(cosines_N: Tensor, *, of: Measurement, **fields: Any) -> list[Score]:
    """The three rows for cosines with an OpenAI CLIP."""
    raw = of.mean("clipscore", cosines_N.tolist(), paper=UM3["clipscore"], **fields)
    times_100 = of.score("clipscore_100", 100 * max(raw.value or 0.0, 0.0), n=raw.n, **fields)
    return [raw, times_100, of.mean("clipscore_2.5", (2.5 * cosines_N.clamp(min=0)).tolist(), **fields)]


def missing_clip(of: Measurement, *, setting: str) -> Score:
    """The row in their place without a CLIP; `setting` is the config key that names one."""
    note = f"needs an OpenAI CLIP; set {setting} to openai/clip-vit-base-patch32 or its folder"
    return of.missing("clipscore", note=note, paper=UM3["clipscore"])
