"""What the web page asks of the model. The functions with a `Job` run in the worker thread.

Shapes: B images, N patches, H height, W width, P visual ids so far.
"""

import base64
import math
import secrets
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from um3.core.errors import UserError
from um3.core.files import parse_json
from um3.core.images import read_image
from um3.core.ranges import EXACT_BELOW
from um3.inference.chat import ROLES, check_codes
from um3.inference.image_io import code_image, png_bytes
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import Sampling, as_options, check_number
from um3.web.worker import Job

MAX_IMAGES, MAX_CANDIDATES = 16, 64
MAX_SEED = EXACT_BELOW - MAX_CANDIDATES
IMAGE_OPTIONS = ("codes", "redraw", "strength")
EXAMPLES = ("a red circle", "three blue squares", "a dog on a beach")
"""Prompts to try of a model that names none."""
LIMITS = {"num_images": (1, 1, MAX_IMAGES), "best_of": (0, 0, MAX_CANDIDATES), "seed": (0, 0, MAX_SEED)}
"""Default, lowest and highest value."""


def parse_request(content: bytes, *, sampling: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` in a JSON request; those that it lacks come from `sampling` and LIMITS.

    Image k has the seed `seed` + k, so that each can be generated again alone. With `codes` of an image, `redraw` or
    `strength` asks for `UM3Pipeline.inpaint` or `vary` of it.
    """
    return _arguments(parse_json(content, where="the request", keys=["prompt"]), sampling=sampling)


def _arguments(options: dict[str, Any], *, sampling: dict[str, Any]) -> dict[str, Any]:
    prompt, counts = options.pop("prompt"), {}
    image = {name: options.pop(name) for name in IMAGE_OPTIONS if name in options}
    if image and not (len(image) == 2 and isinstance(image.get("codes"), list)):
        raise UserError("a change of an image needs its 'codes', a list, and either 'redraw' or 'strength'")
    if "strength" in image:
        check_number(image["strength"], what="strength")
    if "redraw" in image:
        image["redraw"] = _check_box(image["redraw"])
    for name, (default, low, high) in LIMITS.items():
        counts[name] = options.pop(name, default)
        check_number(counts[name], what=name, whole=True)
        if not low <= counts[name] <= high:
            raise UserError(f"{name} is {counts[name]}; use {low} to {high:,}", parameter=name)
    options = sampling | as_options(options)
    Sampling(**options)
    seed = counts.pop("seed")
    seeds = range(seed, seed + (counts["best_of"] or counts["num_images"]))
    return {"prompts": [prompt], "seeds": seeds, **image, **counts, **options}


def _check_box(box: Any) -> tuple[Any, ...]:
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"redraw is {str(box)[:40]!r}; use [left, top, right, bottom] as shares of the image")
    for value in box:
        check_number(value, what="redraw")
    return tuple(box)


def parse_openai_request(content: bytes, *, sampling: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The arguments of `generate` in a request of OpenAI's images API: `prompt`, `n`, `size`, `response_format`.

    `model` and `user` are ignored, and the seed is random. UserError for other sizes and formats, and other keys except
    the project's own.
    """
    options = parse_json(content, where="the request", keys=["prompt"])
    sizes = ("auto", f"{image_size}x{image_size}")
    accepted: dict[str, tuple[str, ...]] = {"size": sizes, "response_format": ("b64_json",)}
    for name, values in accepted.items():
        if (value := options.pop(name, values[0])) not in values:
            raise UserError(f"{name} is {str(value)[:40]!r}; use {' or '.join(values)}", parameter=name)
    for name in ("model", "user"):
        options.pop(name, None)
    seed = {"seed": secrets.randbelow(MAX_SEED)} if "seed" not in options else {}
    count = {"num_images": options.pop("n")} if "n" in options else {}
    return _arguments(seed | count | options, sampling=sampling)


def generate(job: Job, *, pipeline: UM3Pipeline, request: dict[str, Any], shows_rows: bool = True) -> None:
    """Send the partial images after each row of patches if it `shows_rows`, then the finished images.

    With `best_of` the partial events have no images: it is not known yet which candidates are returned. `outside` says
    whether the prompt is outside what the model was trained on, by `UM3Pipeline.prompt_log_ratio` of the first image.
    """
    ids = pipeline.ids
    row_ids = ids.image_tokens // math.isqrt(ids.num_patches)

    def watch(batch: range, ids_PB: Tensor) -> None:
        job.check()
        row, rest = divmod(len(ids_PB), row_ids)
        if shows_rows and rest == 0 and len(ids_PB) < ids.image_tokens:
            images = [] if request["best_of"] else partial_images(pipeline, ids_PB.T)
            job.send({"row": row, "images": [{"url": data_url(image)} for image in images]})

    arguments = request | {"batch_size": MAX_CANDIDATES, "watch": watch}
    if "codes" in arguments:
        arguments["codes_BN"] = check_codes(arguments.pop("codes"), ids=ids, where="codes")[None]
    method = pipeline.inpaint_codes if "redraw" in request else pipeline.vary_codes if "codes" in request else pipeline
    result = method(**arguments)
    similarities: list[Any] = result.similarities or [None] * len(result.seeds)
    values = zip(
        map(data_url, result.images), result.seeds, result.logprobs, similarities, result.codes.tolist(), strict=True
    )
    names = ("url", "seed", "logprob", "similarity", "codes")
    images = [dict(zip(names, image, strict=True)) for image in values]
    outside = pipeline.prompt_log_ratio(result.prompts[0], codes_N=result.codes[0]) < 0
    job.send({"images": images, "outside": outside})


def partial_images(pipeline: UM3Pipeline, ids_BP: Tensor) -> list[Image.Image]:
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


def caption(job: Job, *, pipeline: UM3Pipeline, content: bytes) -> None:
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
            "reconstruction": data_url(result.arrays[0]),
        }
    )


def parse_chat(content: bytes) -> dict[str, Any]:
    """The arguments of `UM3Pipeline.chat` in a JSON request; no image is read from a path.

    `messages` holds texts of the user and the model in turn; optional are `codes` of the image, `seed` and the
    options of `Sampling`.
    """
    options = parse_json(content, where="the request", keys=["messages"])
    texts, codes, seed = options.pop("messages"), options.pop("codes", None), options.pop("seed", 0)
    if not isinstance(texts, list) or not isinstance(codes, list | None):
        raise UserError("'messages' must be a list of texts, and 'codes' a list of whole numbers")
    check_number(seed, what="seed", whole=True)
    image = [] if codes is None else [{"type": "image", "codes": codes}]
    contents = [[*(image if index == 0 else []), {"type": "text", "text": text}] for index, text in enumerate(texts)]
    messages = [{"role": ROLES[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"messages": [messages], "seeds": [seed], **as_options(options)}


def chat(job: Job, *, pipeline: UM3Pipeline, request: dict[str, Any]) -> None:
    """Send the answer to a conversation."""
    job.check()
    answers = pipeline.chat(**request)
    job.send({"answer": answers[0], "logprob": answers.logprobs[0]})


def describe_model(pipeline: UM3Pipeline) -> dict[str, Any]:
    """What the page shows about the model, and the limits of its requests."""
    return {
        "name": pipeline.name,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
        "image_size": pipeline.processor.image_size,
        "rows": math.isqrt(pipeline.ids.num_patches),
        "num_bits": pipeline.ids.num_bits,
        "can_rank": pipeline.can_rank,
        "conversations": pipeline.trained_on,
        "max_images": MAX_IMAGES,
        "examples": pipeline.examples or EXAMPLES,
    }


def data_url(image: Image.Image | np.ndarray) -> str:
    """An image as the URL of a PNG with its metadata."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
