"""Random numbers: every draw is a function of the run's seed and the name of its stream."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from um3.core.ranges import EXACT_BELOW

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; equal on every machine and rank."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_seed(seed: int, *names: str | int) -> int:
    """A seed that is shown, stored and given back: that of one image or text. Lower than EXACT_BELOW."""
    return derive_seed(seed, *names) % EXACT_BELOW


def torch_generator(seed: int, *names: str | int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator for the stream called `names`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for the stream called `names`."""
    return np.random.default_rng(derive_seed(seed, *names))


def seed_everything(seed: int, *names: str | int) -> None:
    """Set torch's global generators (weight initialization, dropout). Data never draws from them."""
    import torch

    torch.manual_seed(derive_seed(seed, *names))
