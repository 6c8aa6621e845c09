"""The data sets of the paper by name: the layout of each on disk once downloaded, and the fields that are read.

`preset: NAME` in a source's config stands for these settings. A preset reads a data set in the layout in which it is
distributed. Nothing is downloaded, and each data set has a licence of its own.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from data_mix.sources.config import ImageSourceConfig, SourceConfig
from data_mix.sources.files import looks_like_hub
from um3.core.errors import UserError

ConfigT = TypeVar("ConfigT", bound=SourceConfig)


@dataclass(frozen=True)
class Preset:
    """A data set: what its path holds, and its licence in the words of its distributors; read it before use.

    settings: the values for the source's config. needs: settings that the config must give as well.
    """

    layout: str
    licence: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()


# img2dataset (and DataComp's own downloader, which uses it) writes NNNNN.tar with KEY.jpg, KEY.txt (the caption column)
# and KEY.json (url, caption, key, sizes and the requested columns); NNNNN.parquet beside it holds no images.
IMG2DATASET = {"kind": "webdataset", "caption_column": "txt"}
SHARD = "KEY.jpg, KEY.txt, KEY.json"
IMAGE_PRESETS = {
    "cc12m": Preset(
        layout=f"img2dataset's shards of cc12m.tsv (columns url, caption): {SHARD}",
        licence="Google: free for any purpose with acknowledgement, as is; the images belong to their owners",
        settings=IMG2DATASET,
    ),
    "sa1b": Preset(
        layout="Meta's sa_NNNNNN.tar: sa_ID.jpg, and sa_ID.json with masks, not captions; those come from `captions`",
        licence="SA-1B Dataset Research License (research only)",
        settings={"kind": "webdataset"},
        needs=("captions",),
    ),
    "laion-coco-aesthetic": Preset(
        layout=f"img2dataset's shards of the url and caption columns: {SHARD}",
        licence="see the card of the subset you use; the images belong to their owners",
        settings=IMG2DATASET,
    ),
    "datacomp-1b": Preset(
        layout=f"the shards of DataComp's download_upstream.py (columns url, text, uid): {SHARD}",
        licence="metadata CC-BY-4.0; the images belong to their owners",
        settings=IMG2DATASET,
    ),
    "coco": Preset(
        layout="a folder with Karpathy's dataset_coco.json (images[]: filepath, filename, split, sentences[].raw), "
        "train2014/ and val2014/; train is train and restval",
        licence="captions CC-BY-4.0; the images under Flickr's terms",
        settings={"kind": "coco"},
    ),
}
TEXT_PRESETS = {
    "dclm-baseline": Preset(
        layout="the .jsonl.zst files of mlfoundations/dclm-baseline-1.0, or parquet files made of them: text, url, ...",
        licence="CC-BY-4.0",
        settings={"field": "text"},
    )
}


def apply_preset(config: ConfigT) -> ConfigT:
    """Fill in the settings of `config.preset` for every field that has its default value; UserError without any."""
    if not config.preset:
        return config
    presets = IMAGE_PRESETS if isinstance(config, ImageSourceConfig) else TEXT_PRESETS
    if config.preset not in presets:
        raise UserError(f"{config.where}: no preset '{config.preset}'; the presets are {', '.join(sorted(presets))}")
    preset = presets[config.preset]
    missing = [name for name in ("path", *preset.needs) if not getattr(config, name)]
    if missing:
        raise UserError(f"{config.where}: preset={config.preset} needs {missing[0]}; it reads {preset.layout}")
    defaults = {field.name: field.default for field in fields(config)}
    settings = {name: value for name, value in preset.settings.items() if getattr(config, name) == defaults[name]}
    if config.path.endswith(".parquet") or looks_like_hub(config.path):
        settings = {name: value for name, value in settings.items() if name == "field"}  # columns are found by name
    return replace(config, **settings)
