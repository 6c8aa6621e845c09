"""What an image source yields: the one type that crosses the door between sources and their readers."""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

Split = Literal["train", "val"]
CaptionChoice = Literal["first", "random"]


class Sample(NamedTuple):
    """One picture with everything that may be said of it.

    image_HWC is uint8 RGB, square, at the source's size; captions holds at least one non-blank string,
    the fullest first.
    """

    key: str
    image_HWC: np.ndarray
    captions: tuple[str, ...]


class BadSample(Exception):
    """This index holds nothing usable. The reader skips it and counts `reason`, a short fixed phrase."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@runtime_checkable
class ImageSource(Protocol):
    """A map from index to sample: the same index gives the same sample in every process."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; raises BadSample when it cannot be used, IndexError past the end."""
        ...
