"""Images that are files of their own: any folder of images with captions, and MS-COCO."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_mix.samples import BadSample, Split
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import file_keys, list_files
from data_mix.sources.images import ImageReader, caption_field
from data_mix.splits import SPLIT_WORDS, choose_samples
from um3.core.errors import UserError
from um3.core.images import SUFFIXES

COCO_FILE = "dataset_coco.json"
COCO_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train", "restval"), "val": ("val",)}


class ImageFiles(ImageReader):
    """Images with the paths `_keys` below the folder `_root`."""

    _root: Path
    _keys: Sequence[str]

    def __len__(self) -> int:
        return len(self._keys)

    def _key(self, index: int) -> str:
        return self._keys[index]

    def _image(self, index: int) -> Path:
        return self._root / self._keys[index]


# Not the `imagefolder` of `datasets`: it takes no captions from .txt files, drops without a word every image that
# metadata.jsonl does not name (2 of 3 in a trial), and gives the label of a folder instead of the split words below.
class FolderImages(ImageFiles):
    """Every image below a folder, with captions from metadata.jsonl or from a .txt file of the same name.

    A metadata.jsonl may lie in any folder and describes the files in and below it: {"file_name": ..., "caption" or
    "captions" or "text": ...}. In a .txt file every line is a caption. If every image lies in a top folder called
    train, val, validation or test, these are the splits; otherwise the hash of the path decides.
    """

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        super().__init__(config, size=size)
        self._root = root = Path(config.path)
        if not root.is_dir():
            raise UserError(f"source '{config.name}': there is no folder '{config.path}'; check the path")
        files = list_files(config.path, suffixes=SUFFIXES, source=config.name, any_case=True, hidden=False)
        reads_captions = config.has_captions and self._caption_table is None
        captions = _metadata_captions(root, where=config.where) if reads_captions else {}
        if reads_captions and not any(file in captions or file.with_suffix(".txt").is_file() for file in files):
            raise UserError(
                f"{config.where}: none of its {len(files)} images has a caption; put a .txt of the same name beside "
                "each, or a metadata.jsonl with file_name and caption, or set has_captions=false if you need none"
            )
        keys = file_keys(files, config.path)
        top_folders = [key.split("/")[0].lower() if "/" in key else "" for key in keys]
        labels = top_folders if SPLIT_WORDS.issuperset(top_folders) else None
        chosen = choose_samples(config, keys, num_samples=len(keys), split=split, labels=labels)
        self._keys = [keys[number] for number in chosen]
        self._metadata = {key: captions[root / key] for key in self._keys if root / key in captions}

    def _captions(self, index: int) -> Any:
        key = self._keys[index]
        if key in self._metadata:
            return self._metadata[key]
        file = (self._root / key).with_suffix(".txt")
        try:
            return file.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise BadSample("no caption", detail=key) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample("unreadable caption", detail=f"{file}: {error}") from None


def _metadata_captions(root: Path, *, where: str) -> dict[Path, Any]:
    """Image path -> captions as written, from all metadata.jsonl files below `root`."""
    captions: dict[Path, Any] = {}
    for file in sorted(root.rglob("metadata.jsonl")):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    image = file.parent / record["file_name"]
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise UserError(
                        f"{where}: {file}:{number} is not a JSON object with file_name ({reason})"
                    ) from None
                captions[image] = caption_field(record)
    return captions


class CocoImages(ImageFiles):
    """MS-COCO in the Karpathy split: dataset_coco.json beside the folders of images; train is train and restval."""

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        super().__init__(config, size=size)
        self._root = Path(config.path)
        file = self._root / COCO_FILE
        try:
            images = [
                image for image in json.loads(file.read_bytes())["images"] if image["split"] in COCO_SPLITS[split]
            ]
            self._keys = [f"{image['filepath']}/{image['filename']}" for image in images]
            self._sentences = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
        except FileNotFoundError:
            raise UserError(f"{config.where}: no {COCO_FILE} in it; put Karpathy's file beside train2014/") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"source '{config.name}': '{file}' is not in Karpathy's format ({reason})") from None
        if not images:
            raise UserError(f"{config.where}: {COCO_FILE} has no image of {' or '.join(COCO_SPLITS[split])}; add data")

    def _captions(self, index: int) -> Any:
        return self._sentences[index]
