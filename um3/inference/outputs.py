"""What the pipeline returns.

Shapes: B pictures, N patches, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from um3.inference.image_io import to_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Generated:
    """Drawn images, prompt-major: those of prompt 0 first.

    images: uint8 (B, H, W, 3); codes: int64 (B, N); logprobs: (B,) in nats, see `um3.inference.generate.DrawnImages`;
    seeds: what each image's random numbers came from; fits: cosine (B,) of each image and its prompt in QLIP's own
    towers, None where nothing was ranked; settings: what all of them were drawn with.
    """

    images: np.ndarray
    codes: Tensor
    prompts: list[str]
    seeds: list[int]
    logprobs: list[float]
    fits: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def metadata(self, index: int) -> dict[str, Any]:
        """Everything but the pixels of one image, as plain JSON: enough to draw it again."""
        values = {"prompt": self.prompts[index], "seed": self.seeds[index], **self.settings}
        values |= {"logprob": self.logprobs[index], "codes": self.codes[index].tolist()}
        return values if self.fits is None else values | {"fit": self.fits[index]}

    @property
    def pictures(self) -> "list[Image.Image]":
        """The images as PIL's, each with its `metadata`; `um3.inference.image_io.save_png` writes that into the file."""
        return [to_picture(image, metadata=self.metadata(index)) for index, image in enumerate(self.images)]

    def take(self, indices: Sequence[int], *, fits: Sequence[float]) -> Self:
        """Some of the images, in this order, with how well each fits."""
        return type(self)(
            images=self.images[list(indices)],
            codes=self.codes[list(indices)],
            prompts=[self.prompts[index] for index in indices],
            seeds=[self.seeds[index] for index in indices],
            logprobs=[self.logprobs[index] for index in indices],
            fits=list(fits),
            settings=self.settings,
        )


@dataclass(frozen=True)
class Reconstruction:
    """Pictures through the tokenizer and back: originals and images uint8 (B, H, W, 3), codes int64 (B, N)."""

    originals: np.ndarray
    images: np.ndarray
    codes: Tensor

    @property
    def pictures(self) -> "list[Image.Image]":
        """What came back, as PIL's."""
        return [to_picture(image) for image in self.images]


class Texts(list[str]):
    """Written texts; beside each its seed and the model's own log-probability of it in nats, its end included."""

    def __init__(self, texts: Sequence[str] = (), *, seeds: Sequence[int] = (), logprobs: Sequence[float] = ()):
        super().__init__(texts)
        self.seeds, self.logprobs = list(seeds), list(logprobs)


@dataclass(frozen=True)
class Part:
    """A piece of an answer: a text or a picture, its seed and log-probability in nats."""

    content: "str | Image.Image"
    seed: int
    logprob: float


@dataclass(frozen=True)
class PairScores:
    """How well each picture and its text fit, (B,) each.

    text_logprobs: of the text given the picture; image_logprobs: of the picture given the text, both the model's, in
    nats; fits: their cosine in QLIP's own towers, None where the tokenizer came without a text tokenizer.
    """

    text_logprobs: list[float]
    image_logprobs: list[float]
    fits: list[float] | None
