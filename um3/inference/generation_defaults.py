"""What pictures are drawn with unless told otherwise: as the model's folder says, or as the demo is measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from um3.core.errors import UserError
from um3.core.files import read_json

FILE = "sampling.json"
DEFAULTS: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "guidance_scale": 2.0}
"""As in configs/demo.yaml, which says how they were found."""


def image_defaults(folder: str | Path) -> dict[str, Any]:
    """Options of `um3.inference.sampling_params.Sampling` by name: DEFAULTS, and over them what `sampling.json` in the folder says.

    Raises:
        UserError: a file that is no table of these options.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return dict(DEFAULTS)
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no table; give it {', '.join(DEFAULTS)}, or remove it")
    return DEFAULTS | as_options(values, where=f"{path}: ")


def as_options(values: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Values from JSON as options of `um3.inference.sampling_params.Sampling`, which judges their ranges.

    Raises:
        UserError: an unknown name, or a value that is no number (whole for top_k, several only for guidance_scale).
    """
    for name, value in values.items():
        if name not in DEFAULTS:
            raise UserError(f"{where}'{name}' is no setting; there are {', '.join(DEFAULTS)}")
        several = name == "guidance_scale" and isinstance(value, list)
        for each in value if several else [value]:
            check_number(each, what=f"{where}{name}", whole=name == "top_k")
    return dict(values)


def check_number(value: Any, *, what: str, whole: bool = False) -> None:
    """Refuse what is no number of at most 63 bits."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, int) and abs(value) >= 1 << 63):
        raise UserError(f"{what} is {str(value)[:40]!r}, no {'whole ' if whole else ''}number that can be used")
