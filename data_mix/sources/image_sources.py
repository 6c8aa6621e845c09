"""Open the image source of a config; images in tables."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from data_mix.demo.digits import DigitsSource
from data_mix.demo.scenes import ScenesSource
from data_mix.samples import BadSample, ImageSource, Split
from data_mix.sources.config import ImageSourceConfig
from data_mix.sources.files import source_kind
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.hub_streaming import HubStream, hub_stream, open_rows
from data_mix.sources.image_folder import CocoImages, FolderImages
from data_mix.sources.images import ImageReader
from data_mix.sources.presets import apply_preset
from data_mix.sources.tables import TableSplit, image_columns
from data_mix.sources.webdataset import WebDatasetImages
from um3.core.errors import UserError


class TableImages(ImageReader):
    """Images and captions in two columns of a table."""

    def __init__(self, config: ImageSourceConfig, rows: TableSplit | HubStream, *, size: int, columns: tuple[str, str]):
        super().__init__(config, size=size, rows=rows)
        self._image_column, self._caption_column = columns

    def _image(self, index: int) -> Path | bytes:
        value = self.rows.value(index, column=self._image_column)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not data and path and self.rows.read_file is not None:
            return cast(Path | bytes, self.rows.read_file(path))
        if not data:
            raise BadSample("no image", detail=self._key(index))
        return data

    def _captions(self, index: int) -> Any:
        return self.rows.value(index, column=self._caption_column)


FILE_READERS: dict[str, Callable[..., ImageSource]]
FILE_READERS = {"folder": FolderImages, "webdataset": WebDatasetImages, "coco": CocoImages}


def open_image_source(
    config: ImageSourceConfig, *, split: Split, size: int, seed: int, classes: bool = False
) -> ImageSource:
    """Open the images of one split as squares of `size` pixels; UserError for a missing path, wrong columns and so on.

    seed: of the scenes. classes: the captions are names or numbers of classes.
    """
    given, config = config, apply_preset(config)
    kind = source_kind(config)
    if config.captions and kind not in ("folder", "webdataset"):
        raise UserError(f"{config.where}: captions is for folders and .tar files, not for kind={kind}")
    if config.exclude and (kind in ("scenes", "digits", "coco") or config.stream):
        raise UserError(
            f"{config.where}: exclude is not for {'streams' if config.stream else f'kind={kind}'}; remove it"
        )
    if kind in FILE_READERS:
        source = FILE_READERS[kind](config, split=split, size=size)
    elif kind in ("scenes", "digits"):
        length = config.length if split == "train" else max(1, round(config.length * config.val_fraction))
        scenes = functools.partial(ScenesSource, length=length, seed=seed)
        try:
            source = (DigitsSource if kind == "digits" else scenes)(size=size, split=split)
        except ValueError as error:
            raise UserError(f"{config.where}: {error}") from None
        source.name = config.name
    else:
        pick = functools.partial(image_columns, config, classes=classes)
        rows = open_rows(config, kind=kind, pick=pick, split=split)
        source = TableImages(config, rows, size=size, columns=pick(rows.schema))
    if isinstance(source, ImageReader):
        source.bad_files.report(len(source))
    stream = hub_stream(source)
    values = (split, seed, len(source), stream.files.digest if stream is not None else "")
    source.fingerprint = functools.partial(source_fingerprint, given, *values)
    return source
