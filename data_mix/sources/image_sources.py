"""Image sources by name: one config, one function that opens it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_mix.demo.digits import DigitsSource
from data_mix.demo.scenes import ScenesSource
from data_mix.samples import BadSample, ImageSource, Sample, Split
from data_mix.sources.caption_table import CaptionTable
from data_mix.sources.coco import CocoImages
from data_mix.sources.hub_streaming import StreamedPart, check_stream
from data_mix.sources.image_folder import FolderImages, TableImages, image_columns
from data_mix.sources.presets import IMAGE_PRESETS, apply_preset
from data_mix.sources.splits import check_val_fraction
from data_mix.sources.tables import TablePart, looks_like_hub, open_hub, open_parquet, parquet_schema
from data_mix.sources.webdataset import WebDatasetImages
from um3.core.errors import UserError

__all__ = ["BadSample", "ImageSource", "ImageSourceConfig", "Sample", "Split", "image_kind", "open_image_source"]

ImageKind = Literal["auto", "scenes", "digits", "folder", "parquet", "webdataset", "coco", "hub"]


@dataclass
class ImageSourceConfig:
    """One image source.

    path: a folder of images, .parquet or .tar file(s), or owner/name@revision:config of a hub set; empty for scenes and
        digits. `auto` tells the kind from it, and scenes or digits from the name.
    preset: a data set whose layout is known (`data_mix.sources.presets`): cc12m, sa1b, laion-coco-aesthetic, datacomp-1b or
        coco.
    weight: its share of the images, relative to the other sources.
    length: how many scenes there are in train; other kinds have what they have.
    image_column, caption_column: of a table; empty to find them by name and type. Of a tar, caption_column is txt or a
        field of the JSON.
    captions: .jsonl or .parquet file(s) with captions by the name of the image's file without its extension, for
        folders and tars: those are used, not what lies beside the images.
    has_captions: false takes images without any, for what reads none (stage 2, reconstructions).
    val_fraction: kept for val where the data does not say itself what is train and what val.
    stream: of a hub set, read the first so many images for train as they come (`data_mix.sources.hub_streaming`), for what reads
        them in order (`make codes`); 0 downloads it whole.
    """

    name: str = "scenes"
    kind: ImageKind = "auto"
    path: str = ""
    preset: str = ""
    weight: float = 1.0
    length: int = 50_000
    image_column: str = ""
    caption_column: str = ""
    captions: str = ""
    has_captions: bool = True
    val_fraction: float = 0.05
    stream: int = 0


def open_image_source(
    config: ImageSourceConfig, *, split: Split, size: int, seed: int, classes: bool = False
) -> ImageSource:
    """Open `config`'s images of one split as squares of `size` pixels. `seed` draws the scenes. `classes`: the captions
    are names or numbers of classes.

    Raises:
        UserError: a missing path, wrong columns or broken containers. A single bad image only raises BadSample
            when it is asked for.
    """
    check_val_fraction(config.val_fraction, name=config.name)
    config = apply_preset(config, presets=IMAGE_PRESETS)
    kind = image_kind(config)
    name, path, val_fraction = config.name, config.path, config.val_fraction
    where = f"source '{name}' ({path})"
    check_stream(config.stream, kind=kind, name=name)
    if config.captions:
        return _with_captions(config, kind=kind, split=split, size=size)
    if kind in ("scenes", "digits"):
        return _drawn_source(config, kind=kind, split=split, size=size, seed=seed)
    common: dict[str, Any] = {"name": name, "size": size, "has_captions": config.has_captions}
    if kind == "folder":
        return FolderImages(path, split=split, val_fraction=val_fraction, **common)
    if kind == "webdataset":
        column = config.caption_column
        return WebDatasetImages(path, split=split, val_fraction=val_fraction, caption_column=column, **common)
    if kind == "coco":
        return CocoImages(path, split=split, **common)
    given: dict[str, Any] = {"image_column": config.image_column, "caption_column": config.caption_column}
    given |= {"has_captions": config.has_captions, "classes": classes}
    part: TablePart | StreamedPart
    if kind == "parquet":
        columns = image_columns(parquet_schema(path, source=name), **given, where=where)
        read = [column for column in columns if column]
        part = open_parquet(path, source=name, columns=read, split=split, val_fraction=val_fraction)
    elif config.stream:
        part = StreamedPart(path, source=name, split=split, num_train=config.stream, val_fraction=val_fraction)
        columns = image_columns(part.schema, **given, where=where)
    else:
        part = open_hub(path, source=name, split=split, val_fraction=val_fraction)
        columns = image_columns(part.table.schema, **given, where=where)
    return TableImages(part, image_column=columns[0], caption_column=columns[1], **common)


def _with_captions(config: ImageSourceConfig, *, kind: str, split: Split, size: int) -> ImageSource:
    """A folder or tar shards, with the captions of a file of its own."""
    if kind not in ("folder", "webdataset"):
        raise UserError(f"source '{config.name}': captions are for folders and .tar files, not for kind={kind}")
    opener = FolderImages if kind == "folder" else WebDatasetImages
    source = opener(
        config.path, name=config.name, split=split, size=size, val_fraction=config.val_fraction, has_captions=False
    )
    if config.has_captions:
        source.captions = CaptionTable(config.captions, column=config.caption_column, source=config.name)
    return source


def _drawn_source(config: ImageSourceConfig, *, kind: str, split: Split, size: int, seed: int) -> ImageSource:
    source: ScenesSource | DigitsSource
    try:
        if kind == "digits":
            source = DigitsSource(size=size, split=split)
        else:
            length = config.length if split == "train" else max(1, round(config.length * config.val_fraction))
            source = ScenesSource(size=size, length=length, seed=seed, split=split)
    except ValueError as error:
        raise UserError(f"source '{config.name}': {error}") from None
    source.name = config.name
    return source


def image_kind(config: ImageSourceConfig) -> ImageKind:
    """`config.kind`, or for `auto` what the name and the path look like.

    Raises:
        UserError: it cannot be told, or the path is missing or not wanted.
    """
    kind = _guess(config) if config.kind == "auto" else config.kind
    if kind in ("scenes", "digits") and config.path:
        raise UserError(f"source '{config.name}': kind={kind} takes no path; drop '{config.path}' or set kind")
    if kind not in ("scenes", "digits") and not config.path:
        raise UserError(f"source '{config.name}': kind={kind} needs a path")
    return kind


def _guess(config: ImageSourceConfig) -> ImageKind:
    path = config.path
    if not path:
        if config.name == "scenes":
            return "scenes"
        if config.name == "digits":
            return "digits"
        raise UserError(f"source '{config.name}' has no path; give one, or set kind to scenes or digits")
    place = Path(path)
    has_parquet = path.endswith(".parquet") or (place.is_dir() and any(place.rglob("*.parquet")))
    has_tar = path.endswith(".tar") or (place.is_dir() and any(place.rglob("*.tar")))
    if has_parquet and has_tar:
        raise UserError(f"source '{config.name}': '{path}' holds both .parquet and .tar; set kind")
    if has_parquet:
        return "parquet"
    if has_tar:
        return "webdataset"
    if place.is_dir():
        return "folder"
    if looks_like_hub(path):
        return "hub"
    raise UserError(
        f"source '{config.name}': '{path}' is no folder, no .parquet or .tar (file, folder or glob) and no hub set "
        "(owner/name); check the path or set kind"
    )
