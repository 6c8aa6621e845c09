"""External tokenizers, working and broken ones: the quantised mean colour of each patch.

Legend: B images, G patches per side, N = G * G codes of an image.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.bits import bits_to_codes, codes_to_bits


class MeanColour:
    """A code is the mean colour of a patch: `bits` each of red, green and blue."""

    def __init__(self, *, image_size: int = 32, patch: int = 8, bits: int = 4):
        self.image_size, self.patch, self.bits = image_size, patch, bits
        self.num_bits, self.num_codes = 3 * bits, (image_size // patch) ** 2

    def encode(self, images_BHWC: NDArray) -> torch.Tensor:
        grid = self.image_size // self.patch
        patches = images_BHWC.reshape(len(images_BHWC), grid, self.patch, grid, self.patch, 3)
        mean_BN3 = torch.tensor(patches.mean(axis=(2, 4))).flatten(1, 2)
        levels_BN3 = (mean_BN3 * 2**self.bits / 256).long()
        return bits_to_codes(codes_to_bits(levels_BN3, num_bits=self.bits).flatten(2))

    def decode(self, codes_BN: torch.Tensor) -> NDArray:
        grid = self.image_size // self.patch
        levels_BN3 = bits_to_codes(codes_to_bits(codes_BN, num_bits=self.num_bits).unflatten(2, (3, self.bits)))
        colours = ((levels_BN3.double() + 0.5) * 256 / 2**self.bits).numpy().astype(np.uint8)
        return colours.reshape(-1, grid, grid, 3).repeat(self.patch, axis=1).repeat(self.patch, axis=2)


class Changed(MeanColour):
    """One with other attributes."""

    def __init__(self, **values: object):
        super().__init__()
        self.__dict__ |= values


def needs_an_argument(size: int) -> MeanColour:
    return MeanColour(image_size=size)


def nothing() -> None:
    return None


coarse = MeanColour
larger = partial(MeanColour, image_size=48, patch=4, bits=6)
named = partial(Changed, fingerprint="v2")
shifted = partial(Changed, encode=lambda images: MeanColour().encode(255 - images))
too_small = partial(MeanColour, image_size=8, patch=4)
no_decode = partial(Changed, decode=None)
too_few_bits = partial(Changed, num_bits=3)
other_number_of_codes = partial(Changed, num_codes=9)
narrow_codes = partial(Changed, encode=lambda images: MeanColour().encode(images).int())
float_images = partial(Changed, decode=lambda codes: MeanColour().decode(codes) / 255)
one_image = partial(Changed, decode=lambda codes: MeanColour().decode(codes)[:1])
NO_FUNCTION = 3
