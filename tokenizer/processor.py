"""QLIPProcessor: images and captions -> tensors for QLIP, and back to images.

Legend: B batch, C channels, H height, W width, T tokens.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.configuration import check_options, read_qlip_config
from um3.core.errors import UserError
from um3.core.files import read_json, write_json
from um3.core.hub import load_pretrained, model_folder, save_tokenizer
from um3.core.text import valid_text

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SCALES = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
STEPS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
"""Options of CLIP's image processor; QLIP's images go through all of these steps."""
OTHER_OPTIONS = (
    "size", "crop_size", "resample", "rescale_factor", "image_processor_type", "feature_extractor_type",
    "processor_class", "_valid_processor_keys",
)  # fmt: skip
"""Options that do not matter: the size is that of config.json, and images are scaled by 1/255."""
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")


class QLIPProcessor:
    """Converts images to normalised pixels and back, and captions to token ids.

    preprocessor_config.json beside the weights gives the normalisation; without that file it is CLIP's.
    """

    def __init__(
        self,
        text_tokenizer: "PreTrainedTokenizerBase | None",
        *,
        image_size: int,
        max_text_tokens: int,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ):
        self._text_tokenizer = text_tokenizer
        self.image_size, self.max_text_tokens = image_size, max_text_tokens
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    @property
    def text_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the text tower; UserError if the folder has none, or one that cannot pad."""
        if self._text_tokenizer is None:
            remedy = "restore its tokenizer.json, or in a released one CLIP's vocab.json and merges.txt"
            raise UserError(f"this QLIP folder has no text tokenizer files; {remedy}")
        if getattr(self._text_tokenizer, "pad_token", "") is None:
            raise UserError(
                "the text tokenizer of this QLIP folder has no padding token; restore tokenizer_config.json"
            )
        return self._text_tokenizer

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> "QLIPProcessor":
        """Load from a QLIP folder or hub id; `options` such as `revision` are the hub's.

        UserError: no QLIP there, or an unknown option or invalid value in preprocessor_config.json.
        """
        from transformers import AutoTokenizer

        options = {name: value for name, value in options.items() if name in HUB_OPTIONS}
        folder = model_folder(path_or_hub_id, kind="QLIP tokenizer", **options)
        config = read_qlip_config(folder)
        text_tokenizer, entries = None, config.text_tower.vocab_size
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            # The folder's model type does not determine its text tokenizer; the tokenizer files do.
            text_tokenizer = load_pretrained(AutoTokenizer, folder, config=config.text_tower, kind="text tokenizer")
            if (largest := max(text_tokenizer.get_vocab().values(), default=0)) >= entries:
                problem = f"the text tokenizer has the id {largest}, but text_config.vocab_size is {entries}"
                raise UserError(f"{folder}: {problem}; restore the tokenizer files that were saved with the model")
        return cls(
            text_tokenizer,
            image_size=config.vision_tower.image_size,
            max_text_tokens=config.text_tower.max_position_embeddings,
            **_read_scales(folder / "preprocessor_config.json"),
        )

    def __call__(
        self,
        *,
        images: "np.ndarray | Tensor | Sequence[Image.Image] | None" = None,
        text: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Images and captions -> inputs of `QLIPModel.forward`: `pixel_values`, `input_ids`, `attention_mask`."""
        inputs = {} if images is None else {"pixel_values": self.pixels(images)}
        return inputs if text is None else inputs | self.text([text] if isinstance(text, str) else text)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json and the files of the text tokenizer."""
        size = {"height": self.image_size, "width": self.image_size}
        values: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "processor_class": "QLIPProcessor"}
        values |= {"size": size, "crop_size": size, "resample": 3, "rescale_factor": 1 / 255}
        values |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        if self._text_tokenizer is not None:
            save_tokenizer(self._text_tokenizer, folder)
        write_json(Path(folder) / "preprocessor_config.json", values)

    def pixels(self, images: "np.ndarray | Tensor | Sequence[Image.Image]") -> Tensor:
        """Images, uint8 (B, H, W, 3) of the model's size or PIL images of any size -> normalised float32 (B, C, H, W).

        PIL images are centre-cropped and resized.
        """
        if not isinstance(images, np.ndarray | Tensor):
            from um3.core.images import plain_rgb, to_square

            images = np.stack([to_square(plain_rgb(image), size=self.image_size) for image in images])
        images_BHWC = torch.as_tensor(images)
        if images_BHWC.dtype != torch.uint8 or images_BHWC.shape[1:] != (self.image_size, self.image_size, 3):
            expected = f"uint8 (B, {self.image_size}, {self.image_size}, 3)"
            raise ValueError(f"images of {images_BHWC.dtype} {tuple(images_BHWC.shape)}; expected {expected}")
        unit_BCHW = images_BHWC.permute(0, 3, 1, 2).float() / 255
        return (unit_BCHW - _channels(self.image_mean, unit_BCHW)) / _channels(self.image_std, unit_BCHW)

    def images(self, pixel_values_BCHW: Tensor) -> np.ndarray:
        """Normalised pixels (B, C, H, W) -> uint8 (B, H, W, 3), clipped and rounded."""
        unit_BCHW = self.unit_range(pixel_values_BCHW.detach().float()).clamp(0, 1)
        return (unit_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def unit_range(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Normalised pixels -> pixels with black 0 and white 1, unclipped, with gradient."""
        x_BCHW = pixel_values_BCHW
        return x_BCHW * _channels(self.image_std, x_BCHW) + _channels(self.image_mean, x_BCHW)

    def text(self, captions: Iterable[str]) -> dict[str, Tensor]:
        """Captions -> `input_ids` and `attention_mask` (B, T), padded to the longest, cut to the tower's positions.

        Names of special tokens in a caption are plain text.
        """
        texts, limit = [valid_text(caption) for caption in captions], self.max_text_tokens
        encoded = self.text_tokenizer(
            texts, padding=True, truncation=True, max_length=limit, split_special_tokens=True, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _channels(values: Sequence[float], like_BCHW: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like_BCHW.dtype, device=like_BCHW.device).view(1, -1, 1, 1)


def _read_scales(path: Path) -> dict[str, Any]:
    """`image_mean` and `image_std` of a preprocessor_config.json; empty without the file."""
    values = read_json(path, dict) if path.exists() else {}
    try:
        check_options(values, known={*SCALES, *STEPS, *OTHER_OPTIONS}, where=path)
        if skipped := [step for step in STEPS if not values.get(step, True)]:
            raise ValueError(f"{path} switches {skipped[0]} off, which QLIP's images need; remove that line")
        for name in values.keys() & SCALES:
            numbers, lowest = values[name], 0 if name == "image_std" else -math.inf
            is_list = isinstance(numbers, list) and len(numbers) == 3
            if not is_list or not all(isinstance(x, int | float) and lowest < x < math.inf for x in numbers):
                raise ValueError(f"{path}: {name} must be three numbers, finite, deviations above 0; correct it")
    except ValueError as error:
        raise UserError(str(error)) from None
    return {name: values[name] for name in SCALES if name in values}
