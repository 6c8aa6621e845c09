"""Batches of images and captions for training the tokenizer: the batch of a step is a function of (seed, step).

Shape legend: B = images of this rank, H, W = height and width in pixels, C = 3 colour channels.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance

from data_mix.batches.config import AugmentConfig
from data_mix.order import SampleOrder, fixed_counts, rank_positions
from data_mix.samples import CaptionChoice, ImageSource
from um3.core.errors import UserError
from um3.core.seeds import derive_seed

SIDES = re.compile(r"(?i)\b(left|right)")
NOTHING = AugmentConfig()


class ImageBatch(NamedTuple):
    """One rank's part of a global batch: images_BHWC (uint8), and the chosen caption, key and source of each.

    skipped: number of unusable samples that were replaced, by (source, reason).
    """

    images_BHWC: torch.Tensor
    captions: list[str]
    keys: list[str]
    sources: list[str]
    skipped: Mapping[tuple[str, str], int]


class ImageBatches:
    """Global batches of `batch_size` images from several sources, cut into equal parts for the ranks.

    After every step, the number of images of each source is its share to within one image (by error diffusion, never
    by random draws). So every batch can be made again from (seed, step) on any number of ranks.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        *,
        weights: Sequence[float] = (),
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        caption: CaptionChoice = "first",
        augment: AugmentConfig = NOTHING,
    ) -> None:
        """`weights`: relative share of each source; without them, in proportion to its length. UserError for no or
        empty sources, two of one name, or a batch that does not divide among the ranks."""
        names = [source.name for source in sources]
        if not names:
            raise UserError("no image sources are given; name at least one in the config's list of images")
        if len(set(names)) < len(names):
            raise UserError(f"image sources {names}: give each its own name")
        weights = weights or [float(len(source)) for source in sources]
        self.counts = fixed_counts(weights, batch_size=batch_size, of=f"image sources {names}")
        self.seed, self.caption, self.augment = seed, caption, augment
        self.positions = rank_positions(batch_size, rank=rank, world_size=world_size)
        self.sources = sources
        self.orders = [SampleOrder(len(source), seed=seed, name=source.name) for source in sources]

    def describe(self, *, num_steps: int) -> str:
        """How often training reads an image of each source, in one line."""
        parts = []
        for source, rate in zip(self.sources, self.counts.due(1), strict=True):
            length = len(source)
            part = f"{source.name}: {length:,} images, each read {rate * num_steps / length:,.1f} times"
            parts.append(part + f" and {rate / length:.1f} times a batch; a smaller batch is enough" * (rate > length))
        return "; ".join(parts)

    def batch(self, step: int) -> ImageBatch:
        """This rank's part of the batch of `step`; UserError if no sample of a source can be used."""
        skipped: Counter[tuple[str, str]] = Counter()
        images, samples, captions, sources = [], [], [], []
        for position, (number, draw) in zip(self.positions, self.counts.draws(step, self.positions), strict=True):
            source = self.sources[number]
            sample, reasons = self.orders[number].first_usable(draw, source.__getitem__, what="sample")
            skipped.update((source.name, reason) for reason in reasons)
            samples.append(sample)
            draw = 0 if self.caption == "first" else derive_seed(self.seed, "caption", step, position)
            image_HWC, caption = sample.image_HWC, sample.captions[draw % len(sample.captions)]
            if self.augment != NOTHING:
                draw = derive_seed(self.seed, "augment", step, position)
                image_HWC = augmented(image_HWC, self.augment, caption=caption, seed=draw)
                if share := self.augment.drop_words:
                    caption = drop_words(caption, share=share, seed=derive_seed(draw, "words"))
            images.append(image_HWC)
            captions.append(caption)
            sources.append(source.name)
        images_BHWC = torch.from_numpy(np.stack(images))
        return ImageBatch(images_BHWC, captions, [sample.key for sample in samples], sources, dict(skipped))

    def fingerprints(self) -> dict[str, str]:
        """Hash of what each source's list of samples depends on, by "images/SOURCE", to verify a resumed run."""
        return {f"images/{source.name}": source.fingerprint() for source in self.sources}


def augmented(image_HWC: np.ndarray, augment: AugmentConfig, *, caption: str, seed: int) -> np.ndarray:
    """The image, changed as `augment` says by random numbers of `seed`."""
    generator, shift, (height, width, _) = np.random.default_rng(seed), augment.shift, image_HWC.shape
    if augment.flip and generator.random() < 0.5 and not SIDES.search(caption):
        image_HWC = image_HWC[:, ::-1]
    padded_HWC = np.pad(image_HWC, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
    top, left = generator.integers(2 * shift + 1, size=2)
    image_HWC = padded_HWC[top : top + height, left : left + width]
    if not (augment.zoom or augment.colour):
        return image_HWC
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    if augment.zoom:
        share, x, y = generator.uniform(1 - augment.zoom, 1), generator.random(), generator.random()
        size = np.array([width, height])
        start = (1 - share) * size * [x, y]
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=(*start, *(start + share * size)))
    if augment.colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(generator.uniform(1 - augment.colour, 1 + augment.colour))
    return np.asarray(image)


def drop_words(caption: str, *, share: float, seed: int) -> str:
    """The caption without this share of its words, chosen by random numbers of `seed`; whole if none would be left."""
    words = caption.split()
    draws = np.random.default_rng(seed).random(len(words))
    return " ".join(word for word, draw in zip(words, draws, strict=True) if draw >= share) or caption
