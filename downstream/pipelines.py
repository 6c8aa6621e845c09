"""Loading of any model that generates images: a UM3 or a LlamaGen."""

from pathlib import Path

import torch

from downstream.llamagen.configuration import LlamaGenConfig
from downstream.llamagen.pipeline import LlamaGenPipeline
from um3.core.files import read_json
from um3.core.hub import model_folder
from um3.inference.image_pipeline import ImagePipeline
from um3.inference.pipeline import UM3Pipeline


def load_pipeline(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    external_tokenizer: str = "",
) -> ImagePipeline:
    """The pipeline of a model folder or hub id, by the model type in its config.json; raises as `from_pretrained`.

    `external_tokenizer`: that of a LlamaGen.
    """
    config = model_folder(path_or_hub_id, kind="model of images") / "config.json"
    is_llamagen = config.is_file() and read_json(config, dict).get("model_type") == LlamaGenConfig.model_type
    if is_llamagen:
        return LlamaGenPipeline.from_pretrained(
            path_or_hub_id, device=device, dtype=dtype, external_tokenizer=external_tokenizer
        )
    return UM3Pipeline.from_pretrained(path_or_hub_id, device=device, dtype=dtype)
