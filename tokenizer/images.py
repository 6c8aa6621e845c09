"""Images to codes and back, images and texts to embeddings: whole data sets, in batches.

Legend: B images, H, W pixels, N codes of an image, T texts, P embedding dimensions.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

    Images = NDArray | Sequence[Image.Image]

CODE_BATCH = 64
EMBEDDING_BATCH = 256


class ImageTokenizer(Protocol):
    """Converts square RGB images of one size to integer codes and back, on a device of its choice."""

    @property
    def image_size(self) -> int:
        """Side of an image, in pixels."""

    @property
    def num_bits(self) -> int:
        """Bits of one code: codes lie in 0 .. 2^num_bits - 1."""

    @property
    def num_codes(self) -> int:
        """Codes of one image."""

    def encode(self, images_BHWC: NDArray, /) -> Tensor:
        """Images uint8 (B, H, W, 3) -> codes int64 (B, N) on the CPU."""

    def decode(self, codes_BN: Tensor, /) -> NDArray:
        """Codes int64 (B, N) on the CPU -> images uint8 (B, H, W, 3)."""


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
    def encode(self, images: "Images", /) -> Tensor:
        """Images, uint8 (B, H, W, 3) or PIL images of any size (cropped, resized) -> codes int64 (B, N)."""
        pixels_BCHW = self.processor.pixels(images)
        return self.model.encode(pixels_BCHW.to(self.model.device, self.model.dtype)).cpu()

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor, /) -> NDArray:
        """Codes int64 (B, N) -> images uint8 (B, H, W, 3), clipped and rounded."""
        return self.processor.images(self.model.decode(codes_BN.to(self.model.device)))


def encode_images(
    tokenizer: ImageTokenizer, images: "Images", *, batch_size: int = CODE_BATCH, label: str = ""
) -> Tensor:
    """All images -> codes int64 (B, N), `batch_size` at a time; a `label` shows the progress."""
    codes = [torch.empty(0, tokenizer.num_codes, dtype=torch.int64)]
    for batch in _batches(len(images), batch_size=batch_size, label=label):
        codes.append(tokenizer.encode(images[batch]))  # type: ignore[arg-type]
    return torch.cat(codes)


def decode_codes(
    tokenizer: ImageTokenizer, codes_BN: Tensor, *, batch_size: int = CODE_BATCH, label: str = ""
) -> NDArray:
    """All codes (B, N) -> images uint8 (B, H, W, 3), `batch_size` at a time; a `label` shows the progress."""
    size = tokenizer.image_size
    images_BHWC = np.empty((len(codes_BN), size, size, 3), dtype=np.uint8)
    for batch in _batches(len(codes_BN), batch_size=batch_size, label=label):
        images_BHWC[batch] = tokenizer.decode(codes_BN[batch])
    return images_BHWC


@torch.no_grad()
def embed_images(images: "Images", *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """All images, uint8 (B, H, W, 3) or PIL images -> l2-normalised embeddings (B, P), float32 on the CPU."""
    batches = (processor.pixels(images[batch]) for batch in _batches(len(images), batch_size=EMBEDDING_BATCH))
    return torch.cat([model.get_image_features(x.to(model.device, model.dtype)).float().cpu() for x in batches])


@torch.no_grad()
def embed_texts(texts: Sequence[str], *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """All texts -> l2-normalised embeddings (T, P), float32 on the CPU."""
    batches = (processor.text(texts[batch])["input_ids"] for batch in _batches(len(texts), batch_size=EMBEDDING_BATCH))
    return torch.cat([model.get_text_features(ids_BT.to(model.device)).float().cpu() for ids_BT in batches])


def _batches(count: int, *, batch_size: int, label: str = "") -> Iterator[slice]:
    progress = Progress(count, label=label) if label else None
    for start in range(0, count, batch_size):
        yield slice(start, start + batch_size)
        if progress:
            progress.advance(min(batch_size, count - start))
