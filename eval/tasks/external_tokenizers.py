"""Tokenizers from other packages, measured beside QLIP: imported by name, and checked on every call.

Shapes: B images, N codes of an image.
"""

import importlib
import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.reconstruction import WINDOW
from tokenizer.bits import MAX_BITS
from tokenizer.images import ImageTokenizer
from um3.core.errors import UserError

LIMITS = {"image_size": (WINDOW, 1 << 14), "num_bits": (1, MAX_BITS), "num_codes": (1, 1 << 24)}


def open_external_tokenizer(target: str, *, name: str) -> "CheckedTokenizer":
    """Call the function `target` (package.module:function, without arguments), and try its result on two images.

    UserError if there is no such function, or it does not return an `ImageTokenizer`.
    """
    where = f"tokenizer.external: {name} ({target})"
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
    tokenizer = CheckedTokenizer(factory(), where=where)
    tokenizer.decode(tokenizer.encode(np.full((2, tokenizer.image_size, tokenizer.image_size, 3), 128, dtype=np.uint8)))
    return tokenizer


class CheckedTokenizer:
    """Wraps an `ImageTokenizer`; UserError if an attribute or a type, shape or range is wrong."""

    def __init__(self, inner: ImageTokenizer, *, where: str):
        for name, (lowest, highest) in LIMITS.items():
            value = getattr(inner, name, None)
            if not isinstance(value, int) or not lowest <= value <= highest:
                raise UserError(f"{where}: {name} is {value!r}; it must be an integer from {lowest} to {highest}")
        for name in ("encode", "decode"):
            if not callable(getattr(inner, name, None)):
                raise UserError(f"{where} has no method {name}; see tokenizer.images.ImageTokenizer")
        self._inner, self._where = inner, where
        self.image_size, self.num_bits, self.num_codes = inner.image_size, inner.num_bits, inner.num_codes

    @torch.inference_mode()
    def encode(self, images_BHWC: NDArray, /) -> Tensor:
        """Images uint8 (B, H, W, 3) -> codes int64 (B, N)."""
        codes_BN = self._inner.encode(images_BHWC)
        self._check("encode", codes_BN, kind=Tensor, dtype=torch.int64, shape=(len(images_BHWC), self.num_codes))
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
