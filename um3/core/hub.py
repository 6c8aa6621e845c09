"""Where a model's files are: a folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from um3.core.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md"]
"""What a model is made of: no code and no pickles."""


def model_folder(path_or_hub_id: str | Path) -> Path:
    """The folder, or that of a hub repository in the cache, fetched where it is not there yet.

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    if Path(path_or_hub_id).exists() or not HUB_ID.fullmatch(str(path_or_hub_id)):
        return Path(path_or_hub_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"'{path_or_hub_id}' is no folder, and the hub does not give it ({type(error).__name__}: {reason}); "
            "pass the folder of a trained UM3 or a hub id"
        ) from None
