"""Images with classes, for zero-shot classification and the linear probe: folders, tables, shards, and the digits.

Shapes: N images, H, W pixels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_mix.demo.digits import DigitsSource, captions_of
from data_mix.samples import BadSample, Split
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from eval.config import ClassificationConfig
from eval.tables import read_text
from um3.core.errors import UserError
from um3.core.files import sha256_of, short_hash, walk_files
from um3.core.images import SUFFIXES, ImageError, read_image, to_square
from um3.core.progress import Progress
from um3.core.text import text_lines, valid_text

BATCH = 256
HASHED_BYTES = 256 * 2**20
LabelledSplit = tuple[Sequence[str | None], Callable[[int], NDArray], str]
"""The label of every image (None if it has none), and `read` and `identity` of its `ClassificationData`."""


class ClassificationData:
    """Images with a class index each, read in batches when they are needed.

    `read` returns an image as uint8 (H, W, 3) at the tokenizer's size. An image that it cannot read (ImageError,
    BadSample), or that has no class, is skipped and counted in `skipped`. `identity` is equal for equal data, whatever
    the tokenizer's size. With a `label` the progress is shown.
    """

    def __init__(
        self, read: Callable[[int], NDArray], *, classes: Sequence[int | None], identity: str, label: str = ""
    ) -> None:
        self.classes, self.identity, self.skipped = classes, identity, 0
        self._read, self._label = read, label

    def __len__(self) -> int:
        """The number of images, including those that are skipped."""
        return len(self.classes)

    def batches(self) -> Iterator[tuple[NDArray, Sequence[int]]]:
        """Images uint8 (N, H, W, 3) and their classes, equal in every pass; UserError if none can be read."""
        self.skipped = 0
        progress = Progress(len(self), label=f"read {self._label}") if self._label else None
        for start in range(0, len(self), BATCH):
            images, classes = [], []
            batch = self.classes[start : start + BATCH]
            for index, number in enumerate(batch, start=start):
                try:
                    if number is None:
                        raise BadSample("no class")
                    images.append(self._read(index))
                    classes.append(number)
                except (BadSample, ImageError):
                    self.skipped += 1
            if progress:
                progress.advance(len(batch))
            if images:
                yield np.stack(images), classes
        if self.skipped == len(self):
            raise UserError(f"{self._label}: none of its {len(self)} images can be read")


class ClassificationTask(NamedTuple):
    """A data set to classify; without `train` there is no linear probe, for the reason in `note`."""

    name: str
    val: ClassificationData
    train: ClassificationData | None
    class_names: list[str]
    templates: list[str]
    note: str = ""


def digits_task(*, size: int) -> ClassificationTask:
    """scikit-learn's digits at `size` pixels."""

    def data(split: Split) -> ClassificationData:
        source = DigitsSource(size=size, split=split)
        images = [source[index].image_HWC for index in range(len(source))]
        return ClassificationData(images.__getitem__, classes=source.labels, identity=f"scikit-learn's digits, {split}")

    names, templates = list(DigitsSource.class_names), list(captions_of("{}"))
    return ClassificationTask("digits", data("val"), data("train"), names, templates)


def open_classification(config: ClassificationConfig, *, size: int) -> ClassificationTask:
    """Open a data set, with its train split if there is one.

    Classes are ordered by the names of their folders, or by their labels in a table (numbers by value). UserError if
    the data cannot be opened, have fewer than two classes, or different ones in train and val, or if the class names
    or templates do not fit.
    """
    is_table, train, note = bool(config.label_column), None, ""
    val = _table_split(config, split="val", size=size) if is_table else _folder_split(config, split="val", size=size)
    if is_table:
        try:
            train = _table_split(config, split="train", size=size)
        except UserError as error:
            note = f"no train split: {error}"
    elif (Path(config.path) / "train").is_dir():
        train = _folder_split(config, split="train", size=size)
        if other := {*val[0]} ^ {*train[0]}:
            raise UserError(f"{config.path}: the class '{min(map(str, other))}' is in only one of train and val")
    else:
        note = f"needs {config.path}/train with a folder of images per class"
    labels = {label for label in (*val[0], *(train[0] if train else ())) if label is not None}
    ordered = sorted(labels, key=int if is_table and all(label.isdecimal() for label in labels) else None)
    if len(ordered) < 2:
        raise UserError(f"{config.path}: found {len(ordered)} classes; classification needs two or more")
    class_names = read_class_names(config.class_names, classes=ordered)
    number_of = {label: number for number, label in enumerate(ordered)}

    def data(split: LabelledSplit, name: str) -> ClassificationData:
        labels, read, identity = split
        classes = [None if label is None else number_of[label] for label in labels]
        return ClassificationData(read, classes=classes, identity=identity, label=f"{config.name} {name}")

    train_data, templates = data(train, "train") if train else None, read_templates(config.templates)
    return ClassificationTask(config.name, data(val, "val"), train_data, class_names, templates, note)


def _folder_split(config: ClassificationConfig, *, split: Split, size: int) -> LabelledSplit:
    """PATH/SPLIT/CLASS/IMAGE at any depth, as ImageNet is usually unpacked. No image is opened."""
    root = Path(config.path) / split
    if not root.is_dir():
        raise UserError(f"{root} does not exist; give a folder with one folder of images per class")
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    files = [(file.relative_to(root).as_posix(), file) for file in walk_files(root, suffixes=SUFFIXES)]
    images = [(name, file.stat().st_size) for name, file in files if name.split("/")[0] in folders]
    labels = [name.split("/")[0] for name, _ in images]
    if empty := folders - {*labels}:
        raise UserError(f"{root / min(empty)} has no image ({' '.join(SUFFIXES)}); delete the folder or add images")

    def read(index: int) -> NDArray:
        return to_square(read_image(root / images[index][0]), size=size)

    return labels, read, f"names and sizes {short_hash(images)}"


def data_hash(path: str | Path) -> str:
    """Names the content of a file, or of all files of a folder, by their names and bytes; empty if there is none.

    A folder of more than HASHED_BYTES is named by the sizes of its files instead.
    """
    if not str(path) or not Path(path).exists():
        return ""
    files = walk_files(path) if Path(path).is_dir() else [Path(path)]
    states = [(os.path.relpath(file, path), file.stat().st_size) for file in files]
    if sum(size for _, size in states) > HASHED_BYTES:
        return short_hash(states)
    return short_hash(states, list(map(sha256_of, files)))


def _table_split(config: ClassificationConfig, *, split: Split, size: int) -> LabelledSplit:
    """Parquet, WebDataset shards or a hub set with a column of classes."""
    source_config = ImageSourceConfig(name=config.name, path=config.path, caption_column=config.label_column)
    source = open_image_source(source_config, split=split, size=size, seed=0, classes=True)
    label_of = getattr(source, "captions_of", None)
    if label_of is None:
        raise UserError(f"tokenizer.classification '{config.name}': {config.path} has no column of classes")
    labels: list[str | None] = []
    for index in range(len(source)):
        try:
            labels.append(label_of(index)[0])
        except BadSample:
            labels.append(None)
    return labels, lambda index: source[index].image_HWC, f"numbers and classes {short_hash(labels)}"


def read_class_names(path: str, *, classes: Sequence[str]) -> list[str]:
    """One name per class, from a file with one per line in the order of `classes`; without a file, `classes`."""
    if not path:
        return [name.replace("_", " ") for name in classes]
    names = _lines(path, what="class names")
    if len(names) != len(classes):
        raise UserError(f"{path} has {len(names)} class names for {len(classes)} classes; write one line per class")
    return names


def read_templates(path: str) -> list[str]:
    """Prompts with one {} for the class name each, from a file with one a line; without a file, a plain one."""
    if not path:
        return ["a photo of a {}."]
    lines = _lines(path, what="templates")
    for line in lines:
        if line.count("{}") != 1 or set(line.replace("{}", "")) & set("{}"):
            raise UserError(f"{path}: '{line}' needs exactly one {{}} for the class name")
    return lines


def _lines(path: str, *, what: str) -> list[str]:
    lines = [valid_text(line.strip()) for line in text_lines(read_text(Path(path))) if line.strip()]
    if not lines:
        raise UserError(f"{path} contains no {what}; write one per line")
    return lines
