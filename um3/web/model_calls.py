"""What the page asks of the model, done in the worker's thread.

Shapes: B pictures, N patches, H height, W width, p visual ids so far.
"""

import base64
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from um3.core.errors import UserError
from um3.core.images import read_image
from um3.inference.generation_defaults import as_options, check_number
from um3.inference.image_io import code_picture, png_bytes
from um3.inference.sampling_params import Sampling
from um3.web.worker import Job

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

MAX_PICTURES, MAX_CANDIDATES = 16, 64
MAX_SEED = 2**53 - MAX_CANDIDATES
"""Whole numbers that a browser counts exactly."""


@dataclass(frozen=True)
class Drawing:
    """A request to draw. Picture k has the seed `seed` + k, so that each can be drawn again alone."""

    prompt: str
    num_images: int
    best_of: int
    seed: int
    options: dict[str, Any]

    @classmethod
    def from_json(cls, content: bytes, *, sampling: dict[str, Any]) -> Self:
        """What a request says, over the model's own `sampling`.

        Raises:
            UserError: no JSON object, an unknown setting, or a value out of its range.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is no JSON ({error})") from None
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise UserError("the request is no object with a prompt that is text")
        prompt = values.pop("prompt")
        limits = {"num_images": (1, 1, MAX_PICTURES), "best_of": (0, 0, MAX_CANDIDATES), "seed": (0, 0, MAX_SEED)}
        counts = {}
        for name, (usual, least, most) in limits.items():
            counts[name] = values.pop(name, usual)
            check_number(counts[name], what=name, whole=True)
            if not least <= counts[name] <= most:
                raise UserError(f"{name} is {counts[name]}; use {least} to {most:,}")
        options = sampling | as_options(values)
        Sampling(**options)
        return cls(prompt=prompt, options=options, **counts)


def draw(job: Job, *, pipeline: "UM3Pipeline", asked: Drawing) -> None:
    """Say the pictures after each row of patches, then the finished ones. Of candidates to choose from, no pictures."""
    ids = pipeline.ids
    row_ids = math.isqrt(ids.num_patches) * ids.subtokens

    def show(batch: range, ids_PB: Tensor) -> None:
        job.check()
        num_ids = len(ids_PB)
        if num_ids % row_ids == 0 and num_ids < ids.image_tokens:
            pictures = [] if asked.best_of else unfinished(pipeline, ids_PB.T)
            job.say({"event": "row", "done": num_ids // row_ids, "pictures": [data_url(each) for each in pictures]})

    generated = pipeline.generate(
        [asked.prompt],
        num_images=asked.num_images,
        best_of=asked.best_of,
        seeds=range(asked.seed, asked.seed + (asked.best_of or asked.num_images)),
        batch_size=MAX_CANDIDATES,
        watch=show,
        **asked.options,
    )
    drawn = [
        {"url": data_url(picture), "seed": generated.seeds[index], "logprob": generated.logprobs[index]}
        | ({"fit": generated.fits[index]} if generated.fits else {})
        for index, picture in enumerate(generated.pictures)
    ]
    job.say({"event": "done", "pictures": drawn})


def unfinished(pipeline: "UM3Pipeline", ids_BP: Tensor) -> list[Image.Image]:
    """Pictures whose first whole rows of codes are drawn; the rest of each is transparent.

    The decoder sees the last row repeated downwards where nothing is drawn, so what shows is close to the final
    picture, not the same.
    """
    ids = pipeline.ids
    side = math.isqrt(ids.num_patches)
    codes_BN = ids.ids_to_codes(ids_BP.cpu())
    drawn_rows = codes_BN.shape[1] // side
    filled_BN = torch.cat([codes_BN, codes_BN[:, -side:].repeat(1, side - drawn_rows)], dim=1)
    images_BHWC = pipeline.decode(filled_BN)
    alpha_BHW1 = np.full_like(images_BHWC[..., :1], 255)
    alpha_BHW1[:, images_BHWC.shape[1] * drawn_rows // side :] = 0
    return [Image.fromarray(image) for image in np.concatenate([images_BHWC, alpha_BHW1], axis=-1)]


def look(job: Job, *, pipeline: "UM3Pipeline", content: bytes) -> None:
    """Say a picture's caption, codes and reconstruction."""
    picture = read_image(content)
    job.check()
    result = pipeline.reconstruct([picture])
    captions = pipeline.caption_codes(result.codes)
    job.say(
        {
            "event": "done",
            "size": picture.size,
            "caption": captions[0],
            "logprob": captions.logprobs[0],
            "original": data_url(result.originals[0]),
            "codes": result.codes[0].tolist(),
            "code_picture": data_url(code_picture(result.codes[0], num_bits=pipeline.ids.num_bits)),
            "reconstruction": data_url(result.images[0]),
        }
    )


def facts(pipeline: "UM3Pipeline") -> dict[str, Any]:
    """What the page says of the model, and what it may ask."""
    try:
        ranks = pipeline.processor.text_tokenizer is not None
    except UserError:
        ranks = False
    return {
        "name": pipeline.name,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
        "image_size": pipeline.processor.image_size,
        "rows": math.isqrt(pipeline.ids.num_patches),
        "num_bits": pipeline.ids.num_bits,
        "image_tokens": pipeline.ids.image_tokens,
        "context": pipeline.model.config.max_position_embeddings,
        "ranks": ranks,
        "max_pictures": MAX_PICTURES,
    }


def data_url(image: Image.Image | np.ndarray) -> str:
    """A picture for the page, with all that its PNG carries."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
