"""Open the image source of a config."""

import functools
from collections.abc import Callable

from data_mix.demo.digits import DigitsSource
from data_mix.demo.scenes import ScenesSource
from data_mix.samples import ImageSource, Split
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import image_kind
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.hub_streaming import hub_stream, open_rows
from data_mix.sources.image_folder import CocoImages, FolderImages
from data_mix.sources.images import ImageReader
from data_mix.sources.presets import IMAGE_PRESETS, apply_preset
from data_mix.sources.tables import TableImages, image_columns
from data_mix.sources.webdataset import WebDatasetImages
from um3.core.errors import UserError

FILE_READERS: dict[str, Callable[..., ImageSource]]
FILE_READERS = {"folder": FolderImages, "webdataset": WebDatasetImages, "coco": CocoImages}


def open_image_source(
    config: ImageSourceConfig, *, split: Split, size: int, seed: int, classes: bool = False
) -> ImageSource:
    """Open the images of one split as squares of `size` pixels; UserError for a missing path, wrong columns and so on.

    seed: of the scenes. classes: the captions are names or numbers of classes.
    """
    source = _open(apply_preset(config, presets=IMAGE_PRESETS), split=split, size=size, seed=seed, classes=classes)
    if isinstance(source, ImageReader):
        source.bad_files.report(len(source))
    stream = hub_stream(source)
    values = (split, seed, len(source), stream.digest if stream is not None else "")
    source.fingerprint = functools.partial(source_fingerprint, config, *values)
    return source


def _open(config: ImageSourceConfig, *, split: Split, size: int, seed: int, classes: bool) -> ImageSource:
    kind = image_kind(config)
    if config.captions and kind not in ("folder", "webdataset"):
        raise UserError(f"{config.where}: captions is for folders and .tar files, not for kind={kind}")
    if kind in FILE_READERS:
        return FILE_READERS[kind](config, split=split, size=size)
    if kind in ("scenes", "digits"):
        length = config.length if split == "train" else max(1, round(config.length * config.val_fraction))
        scenes = functools.partial(ScenesSource, length=length, seed=seed)
        try:
            source: ImageSource = (DigitsSource if kind == "digits" else scenes)(size=size, split=split)
        except ValueError as error:
            raise UserError(f"{config.where}: {error}") from None
        source.name = config.name
        return source
    pick = functools.partial(image_columns, config, classes=classes)
    rows = open_rows(config, kind=kind, pick=pick, split=split)
    return TableImages(config, rows, size=size, columns=pick(rows.schema))
