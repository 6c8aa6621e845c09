"""The options of sampling, and a model's defaults for images. Importing this loads no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.ranges import EXACT_BELOW
from um3.model.configuration import IMAGE_SAMPLING

MAX_GUIDANCE = 1000.0
CONFIG_FILE, CONFIG_KEY = "generation_config.json", "image_sampling"


class TextOptions(TypedDict, total=False):
    """The options of `Sampling` for text."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float


class ImageOptions(TextOptions, total=False):
    """The options of `Sampling` for images."""

    guidance_scale: float | Sequence[float]


@dataclass(frozen=True)
class Sampling:
    """How to sample the next token. Applied in this order: guidance, temperature, top-k, top-p, min-p.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off. min_p keeps entries that are at
    least that share as probable as the most probable one. guidance_scale 1 is the conditional distribution, 0 the
    unconditional one (images only); several scales are a schedule from the first position to the last, linear between
    them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    guidance_scale: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            message = f"temperature {self.temperature:g} is outside [0, inf); 0 is greedy"
            raise UserError(message, parameter="temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps all entries", parameter="top_p")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative; 0 keeps all entries", parameter="top_k")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p {self.min_p} is outside [0, 1]; 0 keeps all entries", parameter="min_p")
        if not self._schedule():
            raise UserError("the guidance schedule is empty; use one scale or more", parameter="guidance_scale")
        for scale in self._schedule():
            if not 0 <= scale <= MAX_GUIDANCE:
                message = f"guidance scale {scale} is outside [0, {MAX_GUIDANCE:g}]; 1 means no guidance"
                raise UserError(message, parameter="guidance_scale")

    @property
    def guided(self) -> bool:
        """Whether sampling needs the unconditional distribution."""
        return any(scale != 1.0 for scale in self._schedule())

    def scales(self, count: int) -> list[float]:
        """The guidance scale at each of `count` positions."""
        points = self._schedule()
        return np.interp(np.linspace(0, len(points) - 1, count), range(len(points)), points).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        points = self._schedule()
        return asdict(self) | {"guidance_scale": points[0] if len(points) == 1 else points}

    def _schedule(self) -> list[float]:
        scale = self.guidance_scale
        return [float(point) for point in scale] if isinstance(scale, Sequence) else [float(scale)]


def image_defaults(folder: str | Path) -> dict[str, Any]:
    """Options of `Sampling` for images: those in the folder's generation_config.json, else `IMAGE_SAMPLING`."""
    path, old = Path(folder) / CONFIG_FILE, Path(folder) / "sampling.json"
    if old.exists():
        raise UserError(f"{old} is not read any more; move its options to '{CONFIG_KEY}' in {path} and delete it")
    values = (read_json(path, dict) if path.exists() else {}).get(CONFIG_KEY, {})
    where = f"{path}, '{CONFIG_KEY}': "
    if not isinstance(values, dict):
        raise UserError(f"{where}{str(values)[:40]!r} is not a table of {', '.join(IMAGE_SAMPLING)}")
    options = IMAGE_SAMPLING | as_options(values, where=where)
    try:
        Sampling(**options)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    return options


def as_options(values: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """JSON values as options of `Sampling`, which checks their ranges; UserError for other names and types."""
    for name, value in values.items():
        if name not in IMAGE_SAMPLING:
            raise UserError(f"{where}unknown option '{name}'; the options are {', '.join(IMAGE_SAMPLING)}")
        for number in value if name == "guidance_scale" and isinstance(value, list) else [value]:
            check_number(number, what=f"{where}{name}", whole=name == "top_k")
    return dict(values)


def check_number(value: Any, *, what: str, whole: bool = False) -> None:
    """Raise UserError unless `value` is a number, or an integer if `whole`, below EXACT_BELOW."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, int) and abs(value) >= EXACT_BELOW):
        message = f"{what} is {str(value)[:40]!r}; use {'an integer' if whole else 'a number'} below 2**53"
        raise UserError(message, parameter=what.rpartition(" ")[2])
