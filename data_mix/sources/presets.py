"""The data sets of the paper by name: how each lies on disk once it is downloaded, and which of its fields are read.

`preset: NAME` in a source's config stands for these settings. What it names is read as it is distributed; none of the
sets is downloaded here, and each has a licence of its own.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from data_mix.sources.tables import looks_like_hub
from um3.core.errors import UserError

if TYPE_CHECKING:
    from data_mix.sources.image_sources import ImageSourceConfig
    from data_mix.sources.text import TextSourceConfig

ConfigT = TypeVar("ConfigT", "ImageSourceConfig", "TextSourceConfig")


@dataclass(frozen=True)
class Preset:
    """One data set.

    layout: what the path holds. licence: as its distributors word it; read it before use. settings: what the preset
    sets in the source's config. needs: settings that have to be given with it.
    """

    layout: str
    licence: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()


# img2dataset (and DataComp's own downloader, which uses it) writes NNNNN.tar with KEY.jpg, KEY.txt (the caption column)
# and KEY.json (url, caption, key, sizes and the further columns asked for); NNNNN.parquet beside it holds no pictures.
IMG2DATASET = {"kind": "webdataset", "caption_column": "txt"}
IMAGE_PRESETS = {
    "cc12m": Preset(
        layout="img2dataset's shards of cc12m.tsv (columns url, caption): KEY.jpg, KEY.txt, KEY.json",
        licence="Google: free for any purpose with acknowledgement, as is; the pictures belong to their owners",
        settings=IMG2DATASET,
    ),
    "sa1b": Preset(
        layout="Meta's sa_NNNNNN.tar: sa_ID.jpg, and sa_ID.json with masks, not captions; those come from `captions`",
        licence="SA-1B Dataset Research License (research only)",
        settings={"kind": "webdataset"},
        needs=("captions",),
    ),
    "laion-coco-aesthetic": Preset(
        layout="img2dataset's shards of the url and caption columns: KEY.jpg, KEY.txt, KEY.json",
        licence="see the card of the subset you use; the pictures belong to their owners",
        settings=IMG2DATASET,
    ),
    "datacomp-1b": Preset(
        layout="the shards of DataComp's download_upstream.py (columns url, text, uid): KEY.jpg, KEY.txt, KEY.json",
        licence="metadata CC-BY-4.0; the pictures belong to their owners",
        settings=IMG2DATASET,
    ),
    "coco": Preset(
        layout="a folder with Karpathy's dataset_coco.json (images[]: filepath, filename, split, sentences[].raw), "
        "train2014/ and val2014/; train is train and restval",
        licence="captions CC-BY-4.0; the pictures under Flickr's terms",
        settings={"kind": "coco"},
    ),
}
TEXT_PRESETS = {
    "dclm-baseline": Preset(
        layout="the .jsonl.zst files of mlfoundations/dclm-baseline-1.0, or the parquet files made of them: text, url, "
        "metadata and scores",
        licence="CC-BY-4.0",
        settings={"field": "text"},
    ),
}


def apply_preset(config: ConfigT, *, presets: dict[str, Preset]) -> ConfigT:
    """`config` with what its preset sets filled in wherever it keeps the default.

    Raises:
        UserError: an preset of that name does not exist, or what it needs is not given.
    """
    if not config.preset:
        return config
    where = f"source '{config.name}'"
    if config.preset not in presets:
        raise UserError(f"{where}: there is no preset '{config.preset}'; there are {', '.join(sorted(presets))}")
    preset: Preset = presets[config.preset]
    missing = [name for name in ("path", *preset.needs) if not getattr(config, name)]
    if missing:
        raise UserError(f"{where}: preset={config.preset} needs {missing[0]}; it reads {preset.layout}")
    defaults = {field.name: field.default for field in fields(config)}
    kept = {name: value for name, value in preset.settings.items() if getattr(config, name) == defaults[name]}
    if config.path.endswith(".parquet") or looks_like_hub(config.path):
        kept = {name: value for name, value in kept.items() if name == "field"}  # a table: columns found by name
    return replace(config, **kept)
