"""How the next id is chosen: the options, and the draw.

Shapes: B samples, V entries of one range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from um3.core.errors import UserError

MAX_GUIDANCE = 1000.0


class TextOptions(TypedDict, total=False):
    """What `Sampling` takes for text."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float


class ImageOptions(TextOptions, total=False):
    """What `Sampling` takes for images."""

    guidance_scale: float | Sequence[float]


@dataclass(frozen=True)
class Sampling:
    """How to choose the next id. Applied in this order: guidance, temperature, top-k, top-p, min-p.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those cuts off. min_p keeps what is at least that
    share as probable as the likeliest. guidance_scale 1 is the plain conditional distribution, 0 the unconditional one
    (images only); several scales are a schedule from the first position to the last, linear between them.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    guidance_scale: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature:g} is outside [0, inf); 0 takes the likeliest")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps everything")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative; 0 keeps everything")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p {self.min_p} is outside [0, 1]; 0 keeps everything")
        if not self._schedule():
            raise UserError("the guidance schedule is empty; give one scale or several")
        for scale in self._schedule():
            if not 0 <= scale <= MAX_GUIDANCE:
                raise UserError(f"guidance scale {scale} is outside [0, {MAX_GUIDANCE:g}]; 1 means no guidance")

    @property
    def guided(self) -> bool:
        """Whether the unconditional distribution is needed at all."""
        return any(scale != 1.0 for scale in self._schedule())

    def scales(self, count: int) -> list[float]:
        """The guidance scale at each of `count` positions."""
        points = self._schedule()
        places = np.linspace(0, len(points) - 1, count) if count > 1 else np.zeros(count)
        return [float(scale) for scale in np.interp(places, range(len(points)), points)]

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON."""
        points = self._schedule()
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return values | {"guidance_scale": points[0] if len(points) == 1 else points}

    def _schedule(self) -> list[float]:
        scale = self.guidance_scale
        return [float(each) for each in scale] if isinstance(scale, Sequence) else [float(scale)]


def choose(logits_BV: Tensor, *, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """Index (B,) drawn from each row of float32 logits by inverting its distribution at `uniforms_B`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # From the highest down: no temperature, however small, makes infinities meet.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        weakest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < weakest_B1, float("-inf"))
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        # Sorting only finds the threshold; the draw stays in id order, where a near-tie cannot swap two entries.
        sorted_BV = _from_highest(probabilities_BV)
        kept_BV = sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
        weakest_B1 = sorted_BV.masked_fill(~kept_BV, 2.0).amin(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < weakest_B1, 0.0)
    if sampling.min_p > 0:
        weakest_B1 = sampling.min_p * probabilities_BV.amax(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < weakest_B1, 0.0)
    cumulative_BV = probabilities_BV.cumsum(-1)
    level_B1 = uniforms_B.double().unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, level_B1, right=True).squeeze(-1).clamp_(max=logits_BV.shape[-1] - 1)


def _from_highest(values_BV: Tensor) -> Tensor:
    """Every row sorted, the highest first."""
    if values_BV.device.type == "cpu":  # numpy sorts with AVX-512, eight times as fast
        return torch.from_numpy(np.sort(values_BV.numpy(), axis=-1)).flip(-1)
    return values_BV.sort(dim=-1, descending=True).values
