"""Where a model's files are: a local folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from um3.core.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md"]
"""What a model folder consists of: no code and no pickles."""


def model_folder(path_or_hub_id: str | Path, *, kind: str = "model") -> Path:
    """The local folder of a model; a hub repository is downloaded to the cache unless it is there.

    Args:
        kind: what is expected there, for the error message, such as "language model" or "QLIP tokenizer".

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
            return Path(snapshot_download(str(path_or_hub_id), allow_patterns=MODEL_FILES))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    raise UserError(
        f"{kind} '{path_or_hub_id}' is neither a local folder nor an accessible Hugging Face repo{reason}; "
        "check the path or the hub id"
    )
