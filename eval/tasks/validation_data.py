"""Validation data for every part: images with captions, and documents, in an order fixed by the seed.

Shapes: N images, H height, W width.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from data_mix.order import each_index
from data_mix.samples import BadSample, Sample
from data_mix.sources.files import source_kind
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.text import TextSourceConfig, open_text_source, readable_texts
from eval.tables import read_text
from um3.core.config import build_config
from um3.core.errors import UserError
from um3.core.files import short_hash

PREPARATION = "RGB, largest centred square, resized by Pillow's antialiased bicubic, uint8"
"""What `um3.core.images.to_square` does to every image that is not rendered here."""
MAX_DOCUMENTS = 10_000  # per source; its val split may be larger than memory
SourceT = TypeVar("SourceT", ImageSourceConfig, TextSourceConfig)


class ValidationImages(NamedTuple):
    """Images uint8 (N, H, W, 3) with all captions of each, the full one first.

    num_skipped: the number of requested samples that could not be used. has_checker: whether the scene checker can
    read the images. protocol: identifies the images by their size, preparation, number and pixels. repeats_captions:
    whether captions are of a few forms, so that a model can be right to the word.
    """

    name: str
    images: NDArray
    captions: list[tuple[str, ...]]
    num_skipped: int
    has_checker: bool
    protocol: dict[str, Any]
    repeats_captions: bool = True

    @property
    def full_captions(self) -> list[str]:
        """captions[0] of every image; all empty if the source has none."""
        return [captions[0] for captions in self.captions]


def trained_on(run: str, *, phase: str, key: str, kind: type[SourceT]) -> list[SourceT]:
    """The sources of a phase of the run, from its config.yaml; the phase never saw their val split.

    UserError if the run has no such phase, or its config.yaml has no usable list of sources.
    """
    path = Path(run) / phase / "config.yaml"
    if not run or not path.is_file():
        name, variable = ("images", "DATA") if kind is ImageSourceConfig else ("texts", "TEXT")
        remedy = f"list the sources under '{name}' (make: {variable}=)"
        raise UserError(f"no validation data: {path} does not exist; {remedy}")
    try:
        sources = yaml.safe_load(read_text(path))["data"][key]
        return [build_config(kind, [(str(path), values)], origin=str(path)) for values in sources]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} has no usable data.{key} ({reason}); list the sources in the command") from None


def validation_images(config: ImageSourceConfig, *, num_images: int, size: int, seed: int) -> ValidationImages:
    """Up to `num_images` usable validation images of a source in a seeded order; UserError if fewer than two."""
    source = open_image_source(config, split="val", size=size, seed=seed)
    samples, num_skipped = list[Sample](), 0
    for index in each_index(source, seed=seed, name=f"eval-{config.name}"):
        if len(samples) == num_images:
            break
        try:
            samples.append(source[index])
        except BadSample:
            num_skipped += 1
    if len(samples) < 2:
        raise UserError(
            f"source '{config.name}' has {len(samples)} usable validation images of {len(source)}; "
            "evaluation needs at least 2: add images or raise its val_fraction"
        )
    kind, images_NHWC = source_kind(config), np.stack([sample.image_HWC for sample in samples])
    is_generated = kind in ("scenes", "digits")
    protocol = {
        "image_size": size,
        "preparation": "rendered at this size" if is_generated else PREPARATION,
        "images": len(samples),
        # sorted: the order of the images does not matter
        "images_sha256": short_hash(sorted(hashlib.sha256(image.tobytes()).hexdigest() for image in images_NHWC)),
    }
    captions = [sample.captions for sample in samples]
    repeats = is_generated or 2 * len({full for full, *_ in captions}) <= len(captions)  # such as names of classes
    return ValidationImages(config.name, images_NHWC, captions, num_skipped, kind == "scenes", protocol, repeats)


def validation_documents(configs: Sequence[TextSourceConfig], *, seed: int) -> list[str]:
    """Up to MAX_DOCUMENTS validation documents of each source, none blank, in a seeded order; UserError if none."""
    documents: list[str] = []
    for config in configs:
        texts = readable_texts(open_text_source(config, split="val"), seed=seed, name=f"eval-{config.name}")
        documents += itertools.islice(texts, MAX_DOCUMENTS)
    if not documents:
        raise UserError("the text sources have no validation documents; raise their val_fraction or set parts=")
    return documents
