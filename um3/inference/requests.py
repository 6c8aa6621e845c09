"""Checks of the pipeline's arguments, and the seed of every result of a call."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

from torch import Tensor

from um3.core.errors import UserError
from um3.core.ranges import EXACT_BELOW
from um3.core.seeds import sample_seed
from um3.core.text import valid_text

Watch = Callable[[range, Tensor], None]
"""Receives, at every position, a batch's indices among all images and its ids so far (positions, B); may raise."""


def resolve_seeds(seeds: Sequence[int] | None, *, names: Sequence[tuple[str | int, ...]], seed: int) -> list[int]:
    """`seeds` after a check, or one seed for each of `names`, derived from `seed`."""
    if seeds is None:
        return [sample_seed(seed, *name) for name in names]
    if len(seeds) != len(names):
        raise UserError(f"{len(seeds)} seeds for {len(names)} results; give one seed per result")
    for value in seeds:
        if not 0 <= value < EXACT_BELOW:
            message = f"seed {value} is outside 0 .. 2**53 - 1; jq and JavaScript round larger integers"
            raise UserError(message, parameter="seed")
    return list(seeds)


def check_texts(texts: Sequence[Any] | str, *, kind: str, may_be_empty: bool = False) -> list[str]:
    """`texts` as a list of valid texts after a check; a single text becomes a list of one."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{kind} {index + 1} is of type {type(text).__name__}; it must be a text", parameter=kind)
        if not (may_be_empty or text.strip()):
            raise UserError(f"{kind} {index + 1} is empty; describe the image", parameter=kind)
    return [valid_text(text) for text in texts]


def check_pairs(images: Sized, texts: Sized) -> None:
    if len(images) != len(texts):
        raise UserError(f"{len(images)} images and {len(texts)} texts; give one text per image")


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} is {count}; use 1 or more", parameter=name)
