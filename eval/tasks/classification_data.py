"""Images with a class each, for zero-shot classification and the linear probe: in memory, or sorted into folders.

Shapes: N images, H, W pixels.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_mix.samples import BadSample
from data_mix.sources.image_folder import OwnImages
from um3.core.errors import UserError
from um3.core.images import SUFFIXES, ImageError, read_image, to_square
from um3.core.progress import Progress

BATCH = 256


class Labelled(Protocol):
    """Images with a class index each, in batches; `skipped` of them could not be read in the last pass.

    `identity` is equal for equal images, whatever the tokenizer's size.
    """

    @property
    def skipped(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int:
        """Images, those that cannot be read included."""
        ...

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        """uint8 images (N, H, W, 3) at the tokenizer's size with their labels; every pass is the same."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """uint8 images (N, H, W, 3) at the tokenizer's size, the class index of each, and a name for them all."""

    images: NDArray
    labels: Sequence[int]
    identity: str
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

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
        self.size, self.skipped, self._root, self._label = size, 0, Path(path), label or str(path)
        if not Path(path).is_dir():
            raise UserError(f"{path} does not exist; give a folder with one folder of images per class")
        self.classes = class_folders(path)
        if len(self.classes) < 2:
            raise UserError(
                f"{path} holds {len(self.classes)} folders; classification needs one for each of two or more"
            )
        self._files: list[tuple[str, int]] = []
        digest = hashlib.sha256()
        for number, name in enumerate(self.classes):
            found = list(listed_images(path, name))
            if not found:
                raise UserError(f"{path}/{name}: no image in it ({' '.join(SUFFIXES)})")
            self._files += [(file.name, number) for file in found]
            digest.update(os.fsencode("".join(f"{file.name}\t{file.num_bytes}\n" for file in found)))
        self.identity = f"sha256 of names and sizes {digest.hexdigest()[:12]}"

    def __len__(self) -> int:
        return len(self._files)

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        self.skipped = 0
        progress = Progress(len(self._files), label=f"read {self._label}")
        for start in range(0, len(self._files), BATCH):
            images, labels = [], []
            chosen = self._files[start : start + BATCH]
            for name, label in chosen:
                try:
                    images.append(to_square(read_image(self._root / name), size=self.size))
                    labels.append(label)
                except ImageError:
                    self.skipped += 1
            progress.advance(len(chosen))
            if images:
                yield np.stack(images), labels
        if self.skipped == len(self._files):
            raise UserError(f"{self._label}: none of its {len(self._files)} images can be read")


class LabelledSource:
    """An image source of `data_mix` whose captions are classes, names or numbers: parquet, WebDataset, the hub.

    Images are read as they are needed; one that cannot be read, or has no class, is skipped and counted.
    """

    def __init__(self, source: OwnImages, *, label: str) -> None:
        """Read the class of every image."""
        self.skipped, self._source, self._label, self._classes = 0, source, label, dict[int, str]()
        digest = hashlib.sha256()
        for index in range(len(source)):
            with contextlib.suppress(BadSample):
                self._classes[index] = source.captions_of(index)[0]
                digest.update(f"{index}\t{self._classes[index]}\n".encode())
        self.identity = f"sha256 of numbers and classes {digest.hexdigest()[:12]}"
        self.number_of: dict[str, int] = {}

    @property
    def found(self) -> set[str]:
        """The classes there are."""
        return set(self._classes.values())

    def __len__(self) -> int:
        return len(self._source)

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        """With labels by `number_of`, which holds every class."""
        self.skipped = 0
        progress = Progress(len(self), label=f"read {self._label}")
        for start in range(0, len(self), BATCH):
            images, labels = [], []
            for index in range(start, min(start + BATCH, len(self))):
                try:
                    images.append(self._source[index].image_HWC)
                    labels.append(self.number_of[self._classes[index]])
                except (BadSample, KeyError):
                    del images[len(labels) :]
                    self.skipped += 1
                progress.advance()
            if images:
                yield np.stack(images), labels
        if self.skipped == len(self):
            raise UserError(f"{self._label}: none of its {len(self)} images can be used")


def ordered_classes(found: set[str]) -> list[str]:
    """Classes in order: numbers by value, else names by the alphabet."""
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)


class ListedFile(NamedTuple):
    """A file by its path below the folder asked for, with its size and its time of change in ns (0 if it has none)."""

    name: str
    num_bytes: int
    changed_ns: int


def class_folders(path: str | Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    return sorted(each.name for each in Path(path).iterdir() if each.is_dir() and each.name[0] != ".")


def listed_images(path: str | Path, name: str) -> Iterator[ListedFile]:
    """The images at any depth of PATH/NAME, in a fixed order; folders are listed and no file is opened."""
    for place, folders, files in os.walk(Path(path) / name):
        folders.sort()
        below = os.path.relpath(place, path)
        for file in sorted(file for file in files if file.lower().endswith(SUFFIXES) and file[0] != "."):
            try:
                stat = os.stat(os.path.join(place, file))  # noqa: PTH116 (a Path for each of a million takes seconds)
            except OSError:  # a link to nothing: skipped and counted when it is read
                yield ListedFile(os.path.join(below, file), 0, 0)
            else:
                yield ListedFile(os.path.join(below, file), stat.st_size, stat.st_mtime_ns)


def listing_sha256(path: str | Path) -> str:
    """Changes when an image in the class folders of PATH is added, removed, renamed or written; empty without PATH."""
    if not Path(path).is_dir():
        return ""
    digest = hashlib.sha256()
    for name in class_folders(path):
        for file in listed_images(path, name):
            digest.update(os.fsencode("\t".join(map(str, file))))
    return digest.hexdigest()


def read_class_names(path: str, *, classes: Sequence[str]) -> list[str]:
    """A name per class from a file of one line each, in the order of the folders; without a file the folders' names.

    Raises:
        UserError: no such file, or another number of lines than there are classes.
    """
    if not path:
        return [name.replace("_", " ") for name in classes]
    names = _lines(path, what="class names")
    if len(names) != len(classes):
        raise UserError(f"{path} names {len(names)} classes, but there are {len(classes)}; give a line for each")
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
