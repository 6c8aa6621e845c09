"""The config of UM3's data, apart from what reads it, so that a phase with nothing to do need not import torch."""

from dataclasses import dataclass, field
from typing import Literal

from data_mix.batches.schedule import MixConfig
from data_mix.samples import CaptionChoice
from data_mix.sources.text import TextSourceConfig
from um3.model.configuration import Supervision


@dataclass
class DataConfig:
    """What UM3 is trained on.

    codes: folder of code shards.
    texts: text sources; their `weight` is their share of the text samples.
    image_weights: share of each source of codes by name, those left out are not used; empty: every source in
        proportion to its size.
    seq_len: longest row; captions are cut to fit, images never are.
    packing: "none" gives every sample a row of its own (the paper); "documents" lays as many side by side as fit, each
        seeing only itself, its positions counted from 0. A batch holds the same samples either way: ratios and
        loop.batch_size count samples, not rows.
    text_seq_len: length of text samples, 0 for `seq_len`. A batch is as wide as its longest row: where captions
        are short, shorter text samples save time.
    caption_dropout: share of the text-to-image samples without their caption (for classifier-free guidance).
    supervision: "target" trains on what the row is to produce, "all" on its condition as well.
    i2t_caption: the caption an image-to-text row is to produce; text-to-image rows draw any.
    """

    codes: str = "codes"
    texts: list[TextSourceConfig] = field(default_factory=list)
    image_weights: dict[str, float] = field(default_factory=dict)
    mix: MixConfig = field(default_factory=MixConfig)
    seq_len: int = 4096
    packing: Literal["none", "documents"] = "none"
    text_seq_len: int = 0
    caption_dropout: float = 0.1
    supervision: Supervision = "target"
    i2t_caption: CaptionChoice = "first"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len={self.seq_len}: a row needs at least 2")
        if self.text_seq_len and not 2 <= self.text_seq_len <= self.seq_len:
            raise ValueError(f"data.text_seq_len={self.text_seq_len}: 0, or from 2 to data.seq_len={self.seq_len}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"data.caption_dropout={self.caption_dropout}: must lie between 0 and 1")
