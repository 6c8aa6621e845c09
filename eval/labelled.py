"""Images with a class each, for zero-shot classification and the linear probe: in memory, or sorted into folders.

Shapes: N images, H, W pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from um3.core.errors import UserError
from um3.core.images import SUFFIXES, ImageError, read_image, to_square
from um3.core.progress import Progress

BATCH = 256


class Labelled(Protocol):
    """Images with a class index each, in batches; `skipped` of them could not be read in the last pass."""

    @property
    def skipped(self) -> int: ...

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        """uint8 images (N, H, W, 3) at the tokenizer's size with their labels; every pass is the same."""
        ...


class LabelledImages(NamedTuple):
    """uint8 images (N, H, W, 3) at the tokenizer's size, and the class index of each."""

    images: NDArray
    labels: Sequence[int]

    @property
    def skipped(self) -> int:
        return 0

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        for start in range(0, len(self.labels), BATCH):
            yield self.images[start : start + BATCH], self.labels[start : start + BATCH]


class LabelledFolder:
    """PATH/CLASS/IMAGE, as ImageNet is usually unpacked. Classes count in the order of their folders' names.

    Images are read, cropped to a square and resized as they are needed; one that cannot be read is skipped and counted.
    """

    def __init__(self, path: str | Path, *, size: int, label: str = "") -> None:
        """Find the images.

        Raises:
            UserError: no such folder, fewer than two classes, or a class without images.
        """
        self.size, self.skipped, self._label = size, 0, label or str(path)
        if not Path(path).is_dir():
            raise UserError(f"{path} does not exist; give a folder with one folder of images per class")
        self.classes = sorted(each.name for each in Path(path).iterdir() if each.is_dir() and each.name[0] != ".")
        if len(self.classes) < 2:
            raise UserError(
                f"{path} holds {len(self.classes)} folders; classification needs one for each of two or more"
            )
        self._files: list[tuple[Path, int]] = []
        for number, name in enumerate(self.classes):
            found = sorted(file for file in (Path(path) / name).rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{path}/{name}: no image in it ({' '.join(SUFFIXES)})")
            self._files += [(file, number) for file in found]

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        self.skipped = 0
        progress = Progress(len(self._files), label=f"read {self._label}")
        for start in range(0, len(self._files), BATCH):
            images, labels = [], []
            chosen = self._files[start : start + BATCH]
            for file, label in chosen:
                try:
                    images.append(to_square(read_image(file), size=self.size))
                    labels.append(label)
                except ImageError:
                    self.skipped += 1
            progress.advance(len(chosen))
            if images:
                yield np.stack(images), labels
        if self.skipped == len(self._files):
            raise UserError(f"{self._label}: none of its {len(self._files)} images can be read")


def read_class_names(path: str, *, classes: Sequence[str]) -> list[str]:
    """A name per class from a file of one line each, in the order of the folders; without a file the folders' names.

    Raises:
        UserError: no such file, or another number of lines than there are classes.
    """
    if not path:
        return [name.replace("_", " ") for name in classes]
    names = _lines(path, what="class names")
    if len(names) != len(classes):
        raise UserError(
            f"{path} names {len(names)} classes, but there are {len(classes)} folders; give a line for each"
        )
    return names


def read_templates(path: str) -> list[str]:
    """Sentences with one {} for the name of a class, from a file of one line each; without a file a single plain one.

    Raises:
        UserError: no such file, an empty one, or a line without its {}.
    """
    if not path:
        return ["a photo of a {}."]
    found = _lines(path, what="templates")
    if wrong := next((line for line in found if line.count("{}") != 1 or set(line.replace("{}", "")) & set("{}")), ""):
        raise UserError(f"{path}: '{wrong}' needs exactly one {{}} where the class's name goes")
    return found


def _lines(path: str, *, what: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} in {path}: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} holds no {what}; write one a line")
    return found
