"""The samples of an image source, and the interface of all image sources."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

Split = Literal["train", "val"]
CaptionChoice = Literal["first", "random"]
ReadT = TypeVar("ReadT")


class Sample(NamedTuple):
    """An image (uint8 RGB, square, of the source's size) and its captions: at least one, the most detailed first."""

    key: str
    image_HWC: np.ndarray
    captions: tuple[str, ...]


class BadSample(Exception):
    """The sample at this index cannot be used. The caller skips it and counts `reason`, a short fixed phrase."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def usable(read: Callable[[int], ReadT], indices: Iterable[int]) -> Iterator[ReadT]:
    """`read` of each of `indices`, without those for which it raises BadSample."""
    for index in indices:
        with contextlib.suppress(BadSample):
            yield read(index)


@runtime_checkable
class ImageSource(Protocol):
    """A map from index to sample; an index gives the same sample in every process.

    fingerprint: computes a hash of what its list of samples depends on; `open_image_source` sets it.
    """

    name: str
    fingerprint: Callable[[], str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; raises BadSample if it cannot be used, IndexError past the end."""
