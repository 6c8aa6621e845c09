"""Configs of the sources of images and texts; any config may hold them."""

from dataclasses import dataclass, field
from typing import Literal

from um3.core.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass
class SourceConfig:
    """What all sources have in common.

    kind: the format of the data; `auto` derives it from the path (`data_mix.sources.files`).
    path: a file, a folder, a glob, or owner/name@revision:config of a Hugging Face data set; empty for generated data.
    preset: a data set with a known layout, see `data_mix.sources.presets`.
    weight: share of the samples, relative to the other sources.
    val_fraction: share that is kept for validation where the data set has no split of its own.
    stream: number of training samples to stream from a Hugging Face data set, in its order; 0 downloads it whole.
    skip_bad_files: skip files that cannot be read, with a warning and exact counts; false makes the first one an error.
        A downloaded Hugging Face data set is always read whole.
    """

    name: str = ""
    kind: str = "auto"
    path: str = ""
    preset: str = ""
    weight: NonNegativeFloat = 1.0
    val_fraction: Decay = 0.05
    stream: NonNegativeInt = 0
    skip_bad_files: bool = True

    def __post_init__(self) -> None:
        if "/" in self.name:
            raise ValueError(f"the name of {self.where} has a '/'; use letters, digits, '.', '_' and '-'")

    @property
    def where(self) -> str:
        """Name and path, for messages."""
        return f"source '{self.name}'" + (f" ({self.path})" if self.path else "")


@dataclass
class ImageSourceConfig(SourceConfig):
    """One source of images.

    length: number of training scenes; other kinds have as many samples as there are.
    image_column, caption_column: of a table; empty finds them by name and type. Of a tar, caption_column is txt, cls or
        a field of the JSON.
    captions: .jsonl or .parquet file(s) with captions by image file name without its extension. For folders and tars;
        they replace the captions beside the images.
    has_captions: false also takes images without captions, for training that reads none (stage 2, reconstruction).
    exclude: keys of images that no split has, such as a/b.png of a folder or 0.parquet#17 of a table.
    """

    name: str = "scenes"
    kind: Literal["auto", "scenes", "digits", "folder", "parquet", "webdataset", "coco", "hub"] = "auto"
    length: PositiveInt = 50_000
    image_column: str = ""
    caption_column: str = ""
    captions: str = ""
    has_captions: bool = True
    exclude: list[str] = field(default_factory=list)


@dataclass
class TextSourceConfig(SourceConfig):
    """One source of texts. field: the JSON field or column that holds the text."""

    name: str = "python_docs"
    kind: Literal["auto", "python_docs", "txt", "jsonl", "parquet", "hub"] = "auto"
    val_fraction: Decay = 0.02
    field: str = "text"


@dataclass
class ConversationSourceConfig(SourceConfig):
    """One source of conversations.

    kind: llava (the JSON of LLaVA at `path`, with the images below the folder `images`), or questions about the demo's
        scenes or digits.
    length: number of training scenes.
    """

    kind: Literal["llava", "scenes", "digits"] = "llava"
    images: str = ""
    length: PositiveInt = 50_000
