"""What the web page asks of the model. The functions with a `Job` run in the worker thread.

Shapes: B images, N patches, H height, W width, P visual ids so far.
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
from um3.inference.image_io import code_image, png_bytes
from um3.inference.sampling_params import Sampling, as_options, check_number
from um3.web.worker import Job

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

MAX_IMAGES, MAX_CANDIDATES = 16, 64
MAX_SEED = 2**53 - MAX_CANDIDATES
"""JavaScript represents integers exactly up to 2**53."""


@dataclass(frozen=True)
class GenerateRequest:
    """A request for images. Image k has the seed `seed` + k, so that each can be generated again alone."""

    prompt: str
    num_images: int
    best_of: int
    seed: int
    options: dict[str, Any]

    @classmethod
    def from_json(cls, content: bytes, *, sampling: dict[str, Any]) -> Self:
        """Parse a request; options that it does not set come from `sampling`.

        Raises:
            UserError: not a JSON object with a prompt, an unknown option, or a value out of its range.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON ({error})") from None
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise UserError("the request is not an object with a text under 'prompt'")
        prompt = values.pop("prompt")
        limits = {"num_images": (1, 1, MAX_IMAGES), "best_of": (0, 0, MAX_CANDIDATES), "seed": (0, 0, MAX_SEED)}
        counts = {}
        for name, (default, low, high) in limits.items():
            counts[name] = values.pop(name, default)
            check_number(counts[name], what=name, whole=True)
            if not low <= counts[name] <= high:
                raise UserError(f"{name} is {counts[name]}; use {low} to {high:,}")
        options = sampling | as_options(values)
        Sampling(**options)
        return cls(prompt=prompt, options=options, **counts)


def generate(job: Job, *, pipeline: "UM3Pipeline", request: GenerateRequest) -> None:
    """Send the partial images after each row of patches, then the finished images with their metadata.

    With `best_of` the partial events have no images: it is not known yet which candidates are returned.
    """
    ids = pipeline.ids
    row_ids = math.isqrt(ids.num_patches) * ids.subtokens

    def watch(batch: range, ids_PB: Tensor) -> None:
        job.check()
        row, rest = divmod(len(ids_PB), row_ids)
        if rest == 0 and len(ids_PB) < ids.image_tokens:
            images = [] if request.best_of else partial_images(pipeline, ids_PB.T)
            job.send({"row": row, "images": [{"url": data_url(image)} for image in images]})

    generated = pipeline.generate(
        [request.prompt],
        num_images=request.num_images,
        best_of=request.best_of,
        seeds=range(request.seed, request.seed + (request.best_of or request.num_images)),
        batch_size=MAX_CANDIDATES,
        watch=watch,
        **request.options,
    )
    similarities: list[Any] = generated.similarities or [None] * request.num_images
    values = zip(generated.pil_images, generated.seeds, generated.logprobs, similarities, strict=True)
    names = ("url", "seed", "logprob", "similarity")
    job.send({"images": [dict(zip(names, (data_url(image), *rest), strict=True)) for image, *rest in values]})


def partial_images(pipeline: "UM3Pipeline", ids_BP: Tensor) -> list[Image.Image]:
    """RGBA images of which the first whole rows of patches have codes; the other rows are transparent.

    For these rows the decoder gets the last row repeated. What it shows of the first rows is therefore close to the
    final image but not equal to it.
    """
    ids = pipeline.ids
    side = math.isqrt(ids.num_patches)
    codes_BN = ids.ids_to_codes(ids_BP.cpu())
    num_rows = codes_BN.shape[1] // side
    filled_BN = torch.cat([codes_BN, codes_BN[:, -side:].repeat(1, side - num_rows)], dim=1)
    images_BHWC = pipeline.decode(filled_BN)
    alpha_BHW1 = np.full_like(images_BHWC[..., :1], 255)
    alpha_BHW1[:, images_BHWC.shape[1] * num_rows // side :] = 0
    return [Image.fromarray(image) for image in np.concatenate([images_BHWC, alpha_BHW1], axis=-1)]


def caption(job: Job, *, pipeline: "UM3Pipeline", content: bytes) -> None:
    """Send an image's caption, codes and reconstruction; `content` is an image file."""
    image = read_image(content)
    job.check()
    result = pipeline.reconstruct([image])
    captions = pipeline.caption_codes(result.codes)
    job.send(
        {
            "size": image.size,
            "caption": captions[0],
            "logprob": captions.logprobs[0],
            "original": data_url(result.originals[0]),
            "codes": result.codes[0].tolist(),
            "code_image": data_url(code_image(result.codes[0], num_bits=pipeline.ids.num_bits)),
            "reconstruction": data_url(result.images[0]),
        }
    )


def describe_model(pipeline: "UM3Pipeline") -> dict[str, Any]:
    """What the page shows about the model, and the limits of its requests."""
    try:
        can_rank = pipeline.processor.text_tokenizer is not None
    except UserError:
        can_rank = False
    return {
        "name": pipeline.name,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
        "image_size": pipeline.processor.image_size,
        "rows": math.isqrt(pipeline.ids.num_patches),
        "num_bits": pipeline.ids.num_bits,
        "can_rank": can_rank,
        "max_images": MAX_IMAGES,
    }


def data_url(image: Image.Image | np.ndarray) -> str:
    """An image as the URL of a PNG with its metadata."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
