"""Pictures to codes and back, as uint8 and in batches: what QLIP, or any other image tokenizer, is asked for.

Legend: B images, H, W pixels, N codes of an image.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

BATCH = 64


class ImageTokenizer(Protocol):
    """Square RGB pictures of one size to integer codes and back. Where it computes is its own business."""

    @property
    def image_size(self) -> int:
        """Side of a picture, in pixels."""
        ...

    @property
    def num_bits(self) -> int:
        """Bits of one code: codes lie in 0 .. 2^num_bits - 1."""
        ...

    @property
    def num_codes(self) -> int:
        """Codes of one picture."""
        ...

    def encode(self, images_BHWC: NDArray, /) -> torch.Tensor:
        """Pictures uint8 (B, H, W, 3) -> codes int64 (B, N) on the CPU."""
        ...

    def decode(self, codes_BN: torch.Tensor, /) -> NDArray:
        """Codes int64 (B, N) on the CPU -> pictures uint8 (B, H, W, 3)."""
        ...


class QLIPImages(NamedTuple):
    """QLIP and its processor as an `ImageTokenizer`."""

    model: QLIPModel
    processor: QLIPProcessor

    @property
    def image_size(self) -> int:
        return self.processor.image_size

    @property
    def num_bits(self) -> int:
        return self.model.num_bits

    @property
    def num_codes(self) -> int:
        return self.model.num_patches

    @torch.inference_mode()
    def encode(self, images: "NDArray | Sequence[Image.Image]", /) -> torch.Tensor:
        """Pictures, uint8 (B, H, W, 3) or PIL images of any size (cropped, resized) -> codes int64 (B, N)."""
        pixels_BCHW = self.processor.pixels(images)
        return self.model.encode(pixels_BCHW.to(self.model.device, self.model.dtype)).cpu()

    @torch.inference_mode()
    def decode(self, codes_BN: torch.Tensor, /) -> NDArray:
        """Codes int64 (B, N) -> pictures uint8 (B, H, W, 3), clipped and rounded."""
        return self.processor.images(self.model.decode(codes_BN.to(self.model.device)))


def encode_images(
    tokenizer: ImageTokenizer, images: "NDArray | Sequence[Image.Image]", *, batch_size: int = BATCH, label: str = ""
) -> torch.Tensor:
    """All pictures -> codes int64 (B, N), `batch_size` at a time; with a `label` the progress is shown."""
    codes = [torch.empty(0, tokenizer.num_codes, dtype=torch.int64)]
    for batch in _batches(len(images), batch_size=batch_size, label=label):
        codes.append(tokenizer.encode(images[batch]))  # type: ignore[arg-type]
    return torch.cat(codes)


def decode_codes(
    tokenizer: ImageTokenizer, codes_BN: torch.Tensor, *, batch_size: int = BATCH, label: str = ""
) -> NDArray:
    """All codes (B, N) -> pictures uint8 (B, H, W, 3), `batch_size` at a time; with a `label` the progress is shown."""
    size = tokenizer.image_size
    images_BHWC = np.empty((len(codes_BN), size, size, 3), dtype=np.uint8)
    for batch in _batches(len(codes_BN), batch_size=batch_size, label=label):
        images_BHWC[batch] = tokenizer.decode(codes_BN[batch])
    return images_BHWC


def _batches(count: int, *, batch_size: int, label: str) -> Iterator[slice]:
    progress = Progress(count, label=label) if label else None
    for start in range(0, count, batch_size):
        yield slice(start, start + batch_size)
        if progress:
            progress.advance(min(batch_size, count - start))
