"""The results of the pipeline.

Shapes: B images, N patches, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from um3.inference.image_io import to_pil


@dataclass(frozen=True)
class Generated:
    """Generated images, prompt-major: those of prompt 0 first.

    arrays: uint8 (B, H, W, 3); codes: int64 (B, N); logprobs: (B,) in nats, see `um3.inference.generate.SampledImages`;
    seeds: the seed of each image; settings: the options of all images; similarities: cosine (B,) of each image and its
    prompt in QLIP's towers, None without ranking.
    """

    arrays: np.ndarray
    codes: Tensor
    prompts: list[str]
    seeds: list[int]
    logprobs: list[float]
    settings: dict[str, Any] = field(default_factory=dict)
    similarities: list[float] | None = None

    def metadata(self, index: int) -> dict[str, Any]:
        """Everything except the pixels of one image, as JSON values: enough to generate it again."""
        values = {"prompt": self.prompts[index], "seed": self.seeds[index], **self.settings}
        values |= {"logprob": self.logprobs[index], "codes": self.codes[index].tolist()}
        return values if self.similarities is None else values | {"similarity": self.similarities[index]}

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images as PIL images with their `metadata`, which `um3.inference.image_io.save_png` writes to a file."""
        return [to_pil(array, metadata=self.metadata(index)) for index, array in enumerate(self.arrays)]

    def take(self, indices: Sequence[int]) -> Self:
        """Some of the images, in this order."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        lists: dict[str, Any] = {
            name: [values[index] for index in indices] for name, values in columns.items() if isinstance(values, list)
        }
        return replace(self, arrays=self.arrays[list(indices)], codes=self.codes[list(indices)], **lists)

    def with_settings(self, **settings: Any) -> Self:
        """The same images with more settings."""
        return replace(self, settings=self.settings | settings)


@dataclass(frozen=True)
class Reconstruction:
    """Images through the tokenizer and back: originals and arrays uint8 (B, H, W, 3), codes int64 (B, N)."""

    originals: np.ndarray
    arrays: np.ndarray
    codes: Tensor

    @cached_property
    def images(self) -> list[Image.Image]:
        """The reconstructed images as PIL images."""
        return [to_pil(array) for array in self.arrays]


class Texts(list[str]):
    """Generated texts, with each text's seed and its log-probability in nats, the end of text included."""

    def __init__(self, texts: Sequence[str] = (), *, seeds: Sequence[int] = (), logprobs: Sequence[float] = ()):
        super().__init__(texts)
        self.seeds, self.logprobs = list(seeds), list(logprobs)


@dataclass(frozen=True)
class Part:
    """A part of an answer: a text or an image, its seed and log-probability in nats."""

    content: str | Image.Image
    seed: int
    logprob: float


@dataclass(frozen=True)
class PairScores:
    """How well each image and its text match, (B,) each.

    text_logprobs: of the text given the image; image_logprobs: of the image given the text, both in nats;
    similarities: their cosine in QLIP's towers, None if the tokenizer has no text tokenizer.
    """

    text_logprobs: list[float]
    image_logprobs: list[float]
    similarities: list[float] | None
