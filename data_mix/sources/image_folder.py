"""Images that are files of their own: any folder of images with captions, and MS-COCO."""

import os
import posixpath
from pathlib import Path
from typing import Any

from data_mix.samples import BadSample, Split
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import file_keys, match_names, read_records
from data_mix.sources.images import ImageReader, caption_field
from data_mix.splits import SPLIT_WORDS, choose_samples
from um3.core.errors import UserError
from um3.core.files import parse_json, walk_files
from um3.core.images import SUFFIXES

COCO_FILE = "dataset_coco.json"
COCO_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train", "restval"), "val": ("val",)}
METADATA_FILE = "metadata.jsonl"


def list_folder(config: ImageSourceConfig) -> tuple[list[str], dict[str, str], list[str]]:
    """The files of a source of kind folder that it reads: images, image -> .txt of the same name, metadata.jsonl."""
    suffixes = (*SUFFIXES, ".txt", METADATA_FILE) if config.has_captions and not config.captions else SUFFIXES
    images, texts, metadata = dict[str, str](), dict[str, str](), list[str]()  # stem by path, and path by stem
    for path in map(str, walk_files(config.path, suffixes=suffixes)):
        stem, _, suffix = path.rpartition(".")
        if suffix.lower() == "jsonl":
            metadata += [path] if path.lower().endswith(f"/{METADATA_FILE}") else []
        elif suffix.lower() != "txt":
            images[path] = stem
        elif texts.setdefault(stem, path) != path:
            raise UserError(f"{config.where}: both {texts[stem]} and {path} caption one image; keep one of them")
    stems = match_names(images.values(), texts)
    owners: dict[str, str] = {}  # image by text
    for image, stem in images.items():
        if stem in stems and owners.setdefault(text := texts[stems[stem]], image) != image:
            pair = f"both {owners[text]} and {image} have the captions {text}"
            raise UserError(f"{config.where}: {pair}; rename or delete one image")
    return list(images), {image: text for text, image in owners.items()}, metadata


class ImageFiles(ImageReader):
    """Images with the paths `rows` below the folder `config.path`. _values: their captions, or the path of a .txt."""

    def __init__(self, config: ImageSourceConfig, *, size: int) -> None:
        super().__init__(config, size=size)
        self._root, self.rows, self._values = Path(config.path), list[str](), list[Any]()

    def _key(self, index: int) -> str:
        return str(self.rows[index])

    def _image(self, index: int) -> Path:
        return self._root / self.rows[index]

    def _captions(self, index: int) -> Any:
        value = self._values[index]
        if value is None:
            raise BadSample("no caption", detail=self.rows[index])
        return Path(value).read_bytes() if isinstance(value, str) else value


# Not the `imagefolder` of `datasets`: it takes no captions from .txt files, drops without a word every image that
# metadata.jsonl does not name (2 of 3 in a trial), and gives the label of a folder instead of the split words below.
class FolderImages(ImageFiles):
    """Every image below a folder, with captions from metadata.jsonl or from the lines of a .txt file of the same name.

    A metadata.jsonl may lie in any folder and describes the files in and below it: {"file_name": ..., "caption": ...}.
    If every image lies in a top folder called train, val, validation or test, these are the splits, else the hash of
    the path decides.
    """

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        super().__init__(config, size=size)
        if not self._root.is_dir():
            raise UserError(f"source '{config.name}': there is no folder '{config.path}'; check the path")
        images, sidecars, metadata = list_folder(config)
        if not images:
            raise UserError(f"{config.where}: no {' or '.join(SUFFIXES)} file in it; check the path")
        captions = self._read_metadata(images, metadata)
        without = [image for image in images if image not in captions and image not in sidecars]
        if without and config.has_captions and not config.captions:
            if len(without) == len(images):
                counts = self.bad_files.summary()
                remedy = f"put a .txt of the same name beside each, or a {METADATA_FILE} with file_name and caption"
                problem = f"none of its {len(images)} images has a caption{counts and f' ({counts})'}"
                raise UserError(f"{config.where}: {problem}; {remedy}, or set has_captions=false if you need none")
            self.bad_files.count("no caption", without[0], number=len(without))
        keys = list(file_keys(images, config.path).values())
        top_folders = [key.rpartition("/")[0].split("/")[0].lower() for key in keys]
        labels = top_folders if SPLIT_WORDS.issuperset(top_folders) else None
        chosen = choose_samples(config, keys, num_samples=len(keys), split=split, labels=labels)
        self._read_captions(keys, chosen)
        self.rows = [keys[number] for number in chosen]
        self._values = [captions.get(images[number], sidecars.get(images[number])) for number in chosen]

    def _read_metadata(self, images: list[str], files: list[str]) -> dict[str, list[Any]]:
        """Image -> captions as written, from all lines that name the image."""
        captions: dict[str, list[Any]] = {}
        for file in files:
            folder = os.path.dirname(file)  # noqa: PTH120 (a million Path objects take seconds)
            reason = "no JSON object with file_name"
            records = read_records(Path(file), _name_and_caption, reason=reason, bad_files=self.bad_files)
            for _, (name, caption) in records:
                texts = captions.setdefault(os.path.normpath(posixpath.join(folder, name)), [])
                texts.extend(caption if isinstance(caption, list) else [caption])
        matches = match_names(images, captions)
        for name in sorted(captions.keys() - matches.values()):
            self.bad_files.count("names no image", name)
        return {image: captions[name] for image, name in matches.items()}


def _name_and_caption(record: dict[str, Any]) -> tuple[str, Any]:
    if not isinstance(name := record["file_name"], str):
        raise TypeError(f"file_name is {name}")
    return name, caption_field(record)


class CocoImages(ImageFiles):
    """MS-COCO in the Karpathy split: dataset_coco.json beside the folders of images; train is train and restval."""

    def __init__(self, config: ImageSourceConfig, *, split: Split, size: int) -> None:
        super().__init__(config, size=size)
        file = self._root / COCO_FILE
        if not file.is_file():
            raise UserError(f"{config.where}: no {COCO_FILE} in it; put Karpathy's file beside train2014/")
        where = f"{config.where}: Karpathy's {COCO_FILE}"
        for number, image in enumerate(parse_json(file.read_bytes(), where=where, keys=["images"])["images"]):
            try:
                if image["split"] in COCO_SPLITS[split]:
                    sentences = [sentence["raw"] for sentence in image["sentences"]]
                    self.rows.append(f"{image['filepath']}/{image['filename']}")
                    self._values.append(sentences)
            except (KeyError, TypeError) as error:
                self.bad_files.skip_record("no split, file or sentences", f"image {number} of {file} ({error})")
        if not self.rows:
            raise UserError(f"{config.where}: {COCO_FILE} has no image of {' or '.join(COCO_SPLITS[split])}; add data")
