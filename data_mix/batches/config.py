"""The configs of UM3's and LLaVA's data, without torch: a command that only reads configs starts faster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from data_mix.batches.schedule import MixConfig
from data_mix.samples import CaptionChoice
from data_mix.sources.config import ConversationSourceConfig, SourceConfig, TextSourceConfig
from um3.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share
from um3.model.configuration import Supervision


@dataclass
class AugmentConfig:
    """Random changes of training images and their captions; none by default.

    flip: mirror half of the images, except where the caption names a side (left, right).
    shift: move every image by up to so many pixels in each direction; its edge is repeated.
    zoom: enlarge a random square of every image to its size; the square's side is 1 - zoom to 1 of the image's.
    colour: multiply brightness, contrast and saturation by a factor of 1 - colour to 1 + colour each.
    drop_words: leave out each word of a caption with this probability; the caption stays whole if none would be left.
    """

    flip: bool = False
    shift: NonNegativeInt = 0
    zoom: Annotated[float, Range(0, below=1)] = 0.0
    colour: Annotated[float, Range(0, below=1)] = 0.0
    drop_words: Annotated[float, Range(0, below=1)] = 0.0


@dataclass
class DataConfig:
    """The data that UM3 is trained on.

    codes: folder of code shards.
    texts: text sources; their `weight` is their share of the text samples.
    image_weights: share of each source of codes by name; sources that are not named are not used. Empty: every source
        in proportion to its size.
    seq_len: maximum length of a sequence, in tokens. Captions are cut to fit, images never are.
    packing: "none" gives every sample its own sequence (the paper). "documents" puts as many samples into a sequence as
        fit; each attends only to itself, with positions from 0. A batch holds the same samples either way: ratios and
        loop.batch_size count samples, not sequences.
    text_seq_len: length of text samples, 0 for `seq_len`. A batch is as wide as its longest sequence: where captions
        are short, shorter text samples save time.
    caption_dropout: share of the text-to-image samples without their caption (for classifier-free guidance).
    supervision: "target" trains on the output of a sample (the caption or the image), "all" on its condition as well.
    i2t_caption: which caption an image-to-text sample has; text-to-image samples draw a random one.
    """

    codes: str = "codes"
    texts: list[TextSourceConfig] = field(default_factory=list)
    image_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    mix: MixConfig = field(default_factory=MixConfig)
    seq_len: Annotated[int, Range(2)] = 4096
    packing: Literal["none", "documents"] = "none"
    text_seq_len: NonNegativeInt = 0
    caption_dropout: Share = 0.1
    supervision: Supervision = "target"
    i2t_caption: CaptionChoice = "first"

    def __post_init__(self) -> None:
        if self.text_seq_len and not 2 <= self.text_seq_len <= self.seq_len:
            raise ValueError(f"data.text_seq_len={self.text_seq_len}: 0, or from 2 to data.seq_len={self.seq_len}")
        check_names("data.texts", self.texts)


@dataclass
class CodeDataConfig:
    """Coded images with captions, for text-to-image alone.

    codes: folder of code shards. image_weights: share of each source by name; empty: all, in proportion to their size.
    caption: which caption of an image is read. caption_dropout: share of the samples that train without their caption.
    """

    codes: str = "codes"
    image_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    caption: CaptionChoice = "random"
    caption_dropout: Share = 0.1


@dataclass
class ChatDataConfig(DataConfig):
    """Conversations, and the mix of UM3's training beside them, so that nothing is forgotten.

    conversations: their sources; `weight` is their share of the conversations. Images are found in `codes` by key.
    chat_share: share of a batch's samples that are conversations; the others are those of `mix`.
    """

    conversations: Annotated[list[ConversationSourceConfig], Range(1)] = field(default_factory=list)
    chat_share: Annotated[float, Range(above=0, below=1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("data.conversations", self.conversations)


@dataclass
class LlavaDataConfig:
    """Conversations that train LLaVA.

    conversations: their sources; `weight` is their share.
    template: v1 (LLaVA-1.5's), qa (for small vocabularies), or plain: the image, and the answer as its caption.
    max_tokens: of a conversation with its image tokens; text is cut on the right.
    pad_to_square: pad images to a square in the encoder's mean colour; false crops the centre.
    """

    conversations: Annotated[list[ConversationSourceConfig], Range(1)] = field(default_factory=list)
    template: Literal["v1", "qa", "plain"] = "v1"
    max_tokens: PositiveInt = 2048
    pad_to_square: bool = True

    def __post_init__(self) -> None:
        check_names("data.conversations", self.conversations)


def check_names(key: str, sources: Sequence[SourceConfig]) -> None:
    """ValueError, which names the `key` of the sources, if two of them have one name."""
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{key} have the names {names}; give each source its own name")
