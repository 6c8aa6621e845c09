"""Tokenizers of the user's own, measured beside QLIP: found on the Python path, and checked as they are used.

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


def open_other(target: str, *, name: str) -> "CheckedTokenizer":
    """What the function at `target` (package.module:function, without arguments) returns, tried on two grey images.

    Raises:
        UserError: no such function, or what it returns is no `ImageTokenizer`.
    """
    where = f"tokenizer.others: {name} ({target})"
    module, _, function = target.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"{where} is not of the form package.module:function")
    try:
        factory: Any = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"{where} cannot be imported ({error}); put its folder on PYTHONPATH") from None
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: no function there that takes no arguments ({error})") from None
    found = CheckedTokenizer(factory(), where=where)
    found.decode(found.encode(np.full((2, found.image_size, found.image_size, 3), 128, dtype=np.uint8)))
    return found


class CheckedTokenizer:
    """An `ImageTokenizer` of the user's whose outputs are looked at before they are used."""

    def __init__(self, inner: ImageTokenizer, *, where: str):
        """Raises:
        UserError: a number is missing or out of its range, or encode or decode is missing.
        """
        for name, (least, most) in LIMITS.items():
            value = getattr(inner, name, None)
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"{where}: {name} is {value!r}; give a whole number from {least} to {most}")
        for name in ("encode", "decode"):
            if not callable(getattr(inner, name, None)):
                raise UserError(f"{where}: has no {name}(); see tokenizer.images.ImageTokenizer")
        self._inner, self._where = inner, where
        self.image_size, self.num_bits, self.num_codes = inner.image_size, inner.num_bits, inner.num_codes

    @torch.inference_mode()
    def encode(self, images_BHWC: NDArray, /) -> Tensor:
        """Pictures uint8 (B, H, W, 3) -> codes int64 (B, N).

        Raises:
            UserError: the tokenizer's own `encode` gave anything else.
        """
        codes_BN = self._inner.encode(images_BHWC)
        self._check("encode", codes_BN, kind=Tensor, dtype=torch.int64, shape=(len(images_BHWC), self.num_codes))
        if bool(((codes_BN < 0) | (codes_BN >> self.num_bits > 0)).any()):
            raise UserError(f"{self._where}: encode gave codes outside 0 .. 2^{self.num_bits} - 1; correct num_bits")
        return codes_BN.cpu()

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor, /) -> NDArray:
        """Codes int64 (B, N) -> pictures uint8 (B, H, W, 3).

        Raises:
            UserError: the tokenizer's own `decode` gave anything else.
        """
        images_BHWC = self._inner.decode(codes_BN)
        shape = (len(codes_BN), self.image_size, self.image_size, 3)
        self._check("decode", images_BHWC, kind=np.ndarray, dtype=np.dtype(np.uint8), shape=shape)
        return images_BHWC

    def _check(self, method: str, value: Any, *, kind: type, dtype: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(value, kind) or (value.dtype, tuple(value.shape)) != (dtype, shape):  # type: ignore[attr-defined]
            given = f"{getattr(value, 'dtype', '')} {tuple(getattr(value, 'shape', ()))}"
            raise UserError(
                f"{self._where}: {method} gave {type(value).__name__} {given}; expected {kind.__name__} {dtype} {shape}"
            )
