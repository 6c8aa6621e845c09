"""MS-COCO in the Karpathy split: dataset_coco.json beside the folders of images."""

import json
from pathlib import Path
from typing import Any

from data_mix.samples import Split
from data_mix.sources.image_folder import ListedImages
from um3.core.errors import UserError

FILE = "dataset_coco.json"
PARTS: dict[Split, tuple[str, ...]] = {"train": ("train", "restval"), "val": ("val",)}


class CocoImages(ListedImages):
    """`PATH/FILEPATH/FILENAME` with the five captions of its `sentences`; train is Karpathy's train and restval."""

    def __init__(self, path: str, *, name: str, split: Split, size: int, has_captions: bool = True) -> None:
        super().__init__(name=name, size=size, has_captions=has_captions)
        self._root, file = Path(path), Path(path) / FILE
        try:
            images = json.loads(file.read_bytes())["images"]
            mine = [image for image in images if image["split"] in PARTS[split]]
            self._keys = [f"{image['filepath']}/{image['filename']}" for image in mine]
            self._sentences = [[sentence["raw"] for sentence in image["sentences"]] for image in mine]
        except FileNotFoundError:
            raise UserError(f"source '{name}': no {FILE} in '{path}'; put Karpathy's file beside train2014/") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"source '{name}': '{file}' is not in Karpathy's format ({reason})") from None
        if not mine:
            raise UserError(f"source '{name}': '{file}' has no image of {' or '.join(PARTS[split])}; add data")

    def _captions(self, index: int) -> Any:
        return self._sentences[index]
