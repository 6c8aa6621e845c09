"""Held-out data for every part: images with their captions, and documents, in an order fixed by the seed.

Shapes: N images, H height, W width.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from data_mix.order import each_index
from data_mix.samples import BadSample
from data_mix.sources.image_sources import ImageSourceConfig, image_kind, open_image_source
from data_mix.sources.text import TextSourceConfig, open_text_source, readable_texts
from um3.core.errors import UserError


class HeldOut(NamedTuple):
    """Images uint8 (N, H, W, 3) with all captions of each, the full one first.

    `skipped` counts samples that were asked for and could not be used, by reason. `has_checker`: the scene checker
    can judge such images. `protocol` pins the images: their side, how they were brought to it, their number and pixels.
    """

    name: str
    images: NDArray
    captions: list[tuple[str, ...]]
    skipped: dict[str, int]
    has_checker: bool
    protocol: dict[str, Any]

    @property
    def full_captions(self) -> list[str]:
        """captions[0] of every image; all empty if the source has none."""
        return [given[0] for given in self.captions]

    @property
    def num_skipped(self) -> int:
        """All samples left out."""
        return sum(self.skipped.values())


PREPARATION = "RGB, largest centred square, resized by Pillow's antialiased bicubic, uint8"
"""What um3.core.images.to_square does to every image that is not drawn here."""
MOST_DOCUMENTS = 10_000  # of a source: its val split may be larger than memory
SourceT = TypeVar("SourceT", ImageSourceConfig, TextSourceConfig)


def trained_on(run: str, *, phase: str, key: str, kind: type[SourceT]) -> list[SourceT]:
    """The sources of a phase of the run, from the config.yaml in its folder: their val split was kept out of it.

    Raises:
        UserError: there is no such phase.
    """
    path = Path(run) / phase / "config.yaml"
    if not run or not path.is_file():
        name = "images" if kind is ImageSourceConfig else "texts"
        raise UserError(f"which data is held out? there is no {path}; list the sources under '{name}'")
    return [kind(**values) for values in yaml.safe_load(path.read_text(encoding="utf-8"))["data"][key]]


def held_out_images(config: ImageSourceConfig, *, num_images: int, size: int, seed: int) -> HeldOut:
    """Up to `num_images` usable validation images of a source, in a seeded order.

    Raises:
        UserError: the source cannot be opened, or fewer than two of its validation images can be used.
    """
    source = open_image_source(config, split="val", size=size, seed=seed)
    images: list[NDArray] = []
    captions: list[tuple[str, ...]] = []
    skipped: Counter[str] = Counter()
    for index in each_index(source, seed=seed, name=f"eval-{config.name}"):
        if len(images) == num_images:
            break
        try:
            sample = source[index]
        except BadSample as error:
            skipped[error.reason] += 1
            continue
        images.append(sample.image_HWC)
        captions.append(sample.captions)
    if len(images) < 2:
        raise UserError(
            f"source '{config.name}' has {len(images)} usable validation images of {len(source)}; "
            "evaluation needs at least 2: add images or raise its val_fraction"
        )
    kind = image_kind(config)
    protocol = {
        "image_size": size,
        "preparation": "drawn at this size" if kind in ("scenes", "digits") else PREPARATION,
        "images": len(images),
        "images_sha256": _pixels_sha256(images),
    }
    return HeldOut(config.name, np.stack(images), captions, dict(skipped), kind == "scenes", protocol)


def _pixels_sha256(images: Sequence[NDArray]) -> str:
    """Names a set of images by their pixels; their order does not matter."""
    digests = sorted(hashlib.sha256(image.tobytes()).digest() for image in images)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]


def held_out_documents(configs: Sequence[TextSourceConfig], *, seed: int) -> list[str]:
    """Validation documents of the sources, at most MOST_DOCUMENTS of each, in a seeded order, blanks left out.

    Raises:
        UserError: no source, or no document in any.
    """
    documents: list[str] = []
    for config in configs:
        source = open_text_source(config, split="val")
        texts = readable_texts(source, seed=seed, name=f"eval-{config.name}")
        documents += itertools.islice(texts, MOST_DOCUMENTS)
    if not documents:
        raise UserError("the text sources hold no held-out document; raise their val_fraction, or leave out language")
    return documents
