"""Tables of tensors from published files, without running what a file may hold beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from um3.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NESTED = ("module", "model", "state_dict")
"""Where published files keep the table when it is not the file's whole content."""


def read_tensors(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of a `.safetensors` or tensors-only torch file, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the published weights file, or leave the setting empty")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
        raise UserError(f"{path} cannot be read as tensors only: {' '.join(str(error).split())[:120]}") from None
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no table of tensors")
    return dict(content)
