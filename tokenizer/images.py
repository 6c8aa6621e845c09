"""Images to codes and back, by QLIP or a tokenizer from elsewhere; images and texts to embeddings; all in batches.

Legend: B images, H, W pixels, N codes of an image, T texts, P embedding dimensions.
"""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenizer.bits import MAX_BITS
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError
from um3.core.images import to_square
from um3.core.progress import batches
from um3.core.seeds import numpy_generator

Images = NDArray | Sequence[Image.Image]
CODE_BATCH = 64
EMBEDDING_BATCH = 256
LIMITS = {"image_size": (1, 1 << 14), "num_bits": (1, MAX_BITS), "num_codes": (1, 1 << 24)}
"""Of external tokenizers."""


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

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its codes."""
        return self.model.fingerprint()

    @torch.inference_mode()
    def encode(self, images: Images, /) -> Tensor:
        """Images, uint8 (B, H, W, 3) or PIL images of any size (cropped, resized) -> codes int64 (B, N)."""
        pixels_BCHW = self.processor.pixels(images)
        return self.model.encode(pixels_BCHW.to(self.model.device, self.model.dtype)).cpu()

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor, /) -> NDArray:
        """Codes int64 (B, N) -> images uint8 (B, H, W, 3), clipped and rounded."""
        return self.processor.images(self.model.decode(codes_BN.to(self.model.device)))


class ExternalTokenizer:
    """A tokenizer from elsewhere; UserError if an attribute or a type, shape or range is wrong, on every call."""

    def __init__(self, inner: ImageTokenizer, *, target: str, where: str, min_image_size: int):
        for name, (lowest, highest) in (LIMITS | {"image_size": (min_image_size, LIMITS["image_size"][1])}).items():
            value = getattr(inner, name, None)
            if not isinstance(value, int) or not lowest <= value <= highest:
                raise UserError(f"{where}: {name} is {value!r}; it must be an integer from {lowest} to {highest}")
        for name in ("encode", "decode"):
            if not callable(getattr(inner, name, None)):
                raise UserError(f"{where} has no method {name}; see tokenizer.images.ImageTokenizer")
        self.target, self._inner, self._where = target, inner, where
        self.image_size, self.num_bits, self.num_codes = inner.image_size, inner.num_bits, inner.num_codes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Its name, and its own `fingerprint` (a string) or else a hash of its codes of eight fixed images."""
        own = getattr(self._inner, "fingerprint", None)
        if not isinstance(own, str):
            noise = numpy_generator(0, "external tokenizer").integers(0, 256, size=(8, 8, 8, 3), dtype=np.uint8)
            images_BHWC = np.stack([to_square(Image.fromarray(part), size=self.image_size) for part in noise])
            own = hashlib.sha256(self.encode(images_BHWC).contiguous().numpy().tobytes()).hexdigest()[:16]
        return f"{self.target} {own}"

    @torch.inference_mode()
    def encode(self, images: Images, /) -> Tensor:
        """Images, uint8 (B, H, W, 3) or PIL images of any size (cropped, resized) -> codes int64 (B, N)."""
        if not isinstance(images, np.ndarray):
            images = np.stack([to_square(image.convert("RGB"), size=self.image_size) for image in images])
        codes_BN = self._inner.encode(images)
        self._check("encode", codes_BN, kind=Tensor, dtype=torch.int64, shape=(len(images), self.num_codes))
        if bool(((codes_BN < 0) | (codes_BN >> self.num_bits > 0)).any()):
            raise UserError(f"{self._where}: encode returned codes outside 0 to 2^{self.num_bits}-1; correct num_bits")
        return codes_BN.cpu()

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor, /) -> NDArray:
        """Codes int64 (B, N) -> images uint8 (B, H, W, 3)."""
        images_BHWC = self._inner.decode(codes_BN)
        shape = (len(codes_BN), self.image_size, self.image_size, 3)
        self._check("decode", images_BHWC, kind=np.ndarray, dtype=np.dtype(np.uint8), shape=shape)
        return images_BHWC

    def _check(self, method: str, value: Any, *, kind: type, dtype: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(value, kind) or (value.dtype, tuple(value.shape)) != (dtype, shape):  # type: ignore[attr-defined]
            returned = f"{type(value).__name__} {getattr(value, 'dtype', '')} {tuple(getattr(value, 'shape', ()))}"
            expected = f"{kind.__name__} {dtype} {shape}"
            raise UserError(f"{self._where}: {method} returned {returned}; it must return {expected}")


def external_target(fingerprint: str) -> str:
    """The package.module:function in the fingerprint of an external tokenizer; empty for that of a QLIP."""
    return fingerprint.split()[0] if ":" in fingerprint else ""


def open_external_tokenizer(target: str, *, setting: str, min_image_size: int = 1) -> ExternalTokenizer:
    """Call the function `target` (package.module:function, without arguments), and try its result on two images.

    UserError if there is no such function, or it does not return an `ImageTokenizer`; it begins with the `setting`.
    """
    where = f"{setting} ({target})"
    module, _, function = target.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"{where} does not have the form package.module:function")
    try:
        factory: Any = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"{where} cannot be imported ({error}); add its folder to PYTHONPATH") from None
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is not a function without arguments ({error})") from None
    tokenizer = ExternalTokenizer(factory(), target=target, where=where, min_image_size=min_image_size)
    tokenizer.decode(tokenizer.encode(np.full((2, tokenizer.image_size, tokenizer.image_size, 3), 128, dtype=np.uint8)))
    return tokenizer


def encode_images(
    tokenizer: ImageTokenizer, images: Images, *, batch_size: int = CODE_BATCH, label: str = ""
) -> Tensor:
    """All images -> codes int64 (B, N), `batch_size` at a time; a `label` shows the progress."""
    codes = [torch.empty(0, tokenizer.num_codes, dtype=torch.int64)]
    for batch in batches(len(images), batch_size=batch_size, label=label):
        codes.append(tokenizer.encode(images[batch]))  # type: ignore[arg-type]
    return torch.cat(codes)


def decode_codes(
    tokenizer: ImageTokenizer, codes_BN: Tensor, *, batch_size: int = CODE_BATCH, label: str = ""
) -> NDArray:
    """All codes (B, N) -> images uint8 (B, H, W, 3), `batch_size` at a time; a `label` shows the progress."""
    size = tokenizer.image_size
    images_BHWC = np.empty((len(codes_BN), size, size, 3), dtype=np.uint8)
    for batch in batches(len(codes_BN), batch_size=batch_size, label=label):
        images_BHWC[batch] = tokenizer.decode(codes_BN[batch])
    return images_BHWC


@torch.no_grad()
def embed_images(images: Images, *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """All images, uint8 (B, H, W, 3) or PIL images -> l2-normalised embeddings (B, P), float32 on the CPU."""
    parts = (processor.pixels(images[batch]) for batch in batches(len(images), batch_size=EMBEDDING_BATCH))
    return torch.cat([model.get_image_features(x.to(model.device, model.dtype)).float().cpu() for x in parts])


@torch.no_grad()
def embed_texts(texts: Sequence[str], *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """All texts -> l2-normalised embeddings (T, P), float32 on the CPU."""
    parts = (processor.text(texts[batch])["input_ids"] for batch in batches(len(texts), batch_size=EMBEDDING_BATCH))
    return torch.cat([model.get_text_features(ids_BT.to(model.device)).float().cpu() for ids_BT in parts])
