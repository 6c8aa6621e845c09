"""Files of models: their folder (local, or of the Hugging Face hub), and tensors without running code of a file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from um3.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
"""The files of a model folder; code and pickles are not downloaded."""
NESTED = ("module", "model", "state_dict")
"""Keys under which published files keep the table, if it is not the whole content."""


def model_folder(
    path_or_hub_id: str | Path, *, kind: str = "model", files: Sequence[str] = MODEL_FILES, **options: Any
) -> Path:
    """The local folder of a model; a hub repository is downloaded to the cache unless it is there.

    Args:
        kind: the expected model for the error message, such as "language model" or "QLIP tokenizer".
        files: patterns of the files to download.
        options: `huggingface_hub.snapshot_download`'s, such as `revision`.

    Raises:
        UserError: neither a local folder nor an accessible Hugging Face repo.
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    reason = ""
    if HUB_ID.fullmatch(str(path_or_hub_id)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(files), **options))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    raise UserError(
        f"{kind} '{path_or_hub_id}' is neither a local folder nor an accessible Hugging Face repo{reason}; "
        "check the path or the hub id"
    )


def read_tensors(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of a `.safetensors` file or of a torch file that holds only tensors, on the CPU.

    Raises:
        UserError: the file is missing or damaged, or holds other objects than tensors.
    """
    import torch
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; set the path to the published weights file, or leave it empty")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise many kinds for a damaged or hostile file
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as tensors only ({reason}); fetch it again") from None
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} has no table of tensors; use the published weights file")
    return dict(content)
