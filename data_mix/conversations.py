"""Conversations: LLaVA's JSON as it is, and questions about the demo's scenes and digits.

An image is named by its path below the folder of images, or by the key of its scene or digit; code shards have the same
keys. docs/data.md has the rules.
"""

import functools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa

from data_mix.demo.digits import DigitsSource
from data_mix.demo.questions import Question, choose, digit_questions, scene_questions
from data_mix.demo.scenes import REFERENCE_SIZE, Draw, ScenesSource
from data_mix.json_values import BROKEN, json_values
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.config import ConversationSourceConfig, ImageSourceConfig
from data_mix.sources.file_index import FileIndex
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.image_sources import open_image_source
from um3.core.errors import UserError
from um3.core.files import parse_json
from um3.core.images import ImageError, read_image
from um3.core.progress import batches
from um3.core.seeds import derive_seed
from um3.core.text import valid_text

IMAGE = "<image>"
HUMAN, MODEL = "human", "gpt"
TURNS = "conversations"  # the field of an entry that holds its turns
INDEX_SCHEMA = pa.schema({"offset": pa.int64(), "length": pa.int32(), "image": pa.string(), "is_unusable": pa.bool_()})
"""Where an entry lies in its file, in bytes, its image, and whether that could not be read."""
IMAGES_AT_ONCE = 4096
MAX_UNUSABLE, MIN_COUNTED = 0.01, 1000
"""The share of conversations that may be unusable, and how many a run reads before more of them stop it."""


class Turn(NamedTuple):
    """A question, without the mark of the image, and its answer; both stripped."""

    question: str
    answer: str


class Conversation(NamedTuple):
    """The turns about an image, by its key, or without one. key: names the conversation."""

    key: str
    image: str | None
    turns: tuple[Turn, ...]


class ConversationSource(Protocol):
    """A map from index to conversation. fingerprint: computes a hash of what its conversations depend on."""

    fingerprint: Callable[[], str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """The conversation at `index`; BadSample if it cannot be used, IndexError past the end."""

    def read_image(self, conversation: Conversation) -> np.ndarray:
        """The image of a conversation, uint8 RGB (H, W, 3) of its own size; BadSample if it cannot be read."""


def open_conversations(
    config: ConversationSourceConfig,
    *,
    split: Split,
    check_images: bool = False,
    image_size: int = REFERENCE_SIZE,
    seed: int = 0,
) -> ConversationSource:
    """Open the conversations of one split; UserError for files that hold none, and for settings that do not fit.

    check_images: read every image of LLaVA's JSON once, and skip and count conversations whose image is missing or
    broken. For training that reads them; training on codes does not. image_size, seed: of scenes and digits, as
    `open_image_source` and the code shards have them.
    """
    if config.preset or config.stream:
        raise UserError(f"{config.where}: preset and stream are not for conversations; remove them")
    if bool(config.path) != (config.kind == "llava"):
        verb = "takes no" if config.path else "needs a"
        raise UserError(f"{config.where}: kind={config.kind} {verb} path; set path or kind")
    if config.kind == "llava":
        source: ConversationSource = LlavaConversations(config, split=split, check_images=check_images)
    else:
        source = Questions(config, split=split, image_size=image_size, seed=seed)
    values = (split, len(source)) if config.kind == "llava" else (split, len(source), image_size, seed)
    source.fingerprint = functools.partial(source_fingerprint, config, *values)
    return source


class LlavaConversations(FileIndex):
    """JSON lists, or JSON lines, of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}.

    Entries are found and checked once, and read from disk when needed. All conversations of an image are in one split.
    """

    fingerprint: Callable[[], str]

    def __init__(self, config: ConversationSourceConfig, *, split: Split, check_images: bool) -> None:
        self.images = Path(config.images)
        if check_images and not self.images.is_dir():
            raise UserError(f"{config.where}: there is no folder '{config.images}'; set images to that of its images")
        variant = str(self.images.resolve()) if check_images else ""
        list_file = functools.partial(self._entries, check_images=check_images)
        super().__init__(config, kind="llava", variant=variant, split=split, list_file=list_file, is_kept=check_images)
        self._skip_unusable_images(config)
        self.bad_files.report(len(self))

    def all_keys(self, *, separator: str = "#") -> Iterator[str]:
        """The image of each conversation, which decides on its split; of one without, its name."""
        images = (image for table in self._tables for image in table.column("image").to_pylist())
        for key, image in zip(super().all_keys(separator=separator), images, strict=True):
            yield image or key

    def _entries(self, file: Path, bad_files: BadFiles, *, check_images: bool) -> pa.RecordBatch:
        columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
        for offset, length, entry in json_values(file, key=TURNS):
            try:
                image, _ = parse_entry(entry)
            except BadSample as error:
                bad_files.skip_record(error.reason, f"byte {offset} of {file}")
                continue
            columns["offset"].append(offset)
            columns["length"].append(length)
            columns["image"].append(image)
        images = sorted({*columns["image"]} - {None}) if check_images else []
        problems = self._image_problems(images, label=f"checking the images of {bad_files.source}")
        columns["is_unusable"] = [image in problems for image in columns["image"]]
        return pa.record_batch(columns, schema=INDEX_SCHEMA)

    def _image_problems(self, images: Sequence[str], *, label: str) -> dict[str, str]:
        """Why images cannot be read, of those that cannot."""

        def problem(image: str) -> str:
            try:
                self._read_image(image)
            except BadSample as error:
                return error.reason
            return ""

        problems: dict[str, str] = {}
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding releases the interpreter's lock
            for batch in batches(len(images), batch_size=IMAGES_AT_ONCE, label=label, unit="images"):
                found = zip(images[batch], threads.map(problem, images[batch]), strict=True)
                problems |= {image: reason for image, reason in found if reason}
        return problems

    def _skip_unusable_images(self, config: ConversationSourceConfig) -> None:
        """Drop the conversations of this split whose image still cannot be read, and count them; UserError if all."""

        def per_row(flags: Iterable[Any]) -> np.ndarray:
            return np.concatenate([flag.to_numpy(zero_copy_only=False) for flag in flags])[self.rows]

        num_with_image = per_row(table.column("image").is_valid() for table in self._tables).sum()
        unusable = np.flatnonzero(per_row(table.column("is_unusable") for table in self._tables))
        flagged = {index: self.value(index, column="image") for index in unusable.tolist()}
        problems = self._image_problems(sorted({*flagged.values()}), label=f"checking again for {config.name}")
        for image in flagged.values():
            if image in problems:
                self.bad_files.skip_record(problems[image], image)
        dropped = [index for index, image in flagged.items() if image in problems]
        self.rows = np.delete(self.rows, dropped)
        if dropped and len(dropped) == num_with_image:  # another folder; text alone would train without a word
            problem = f"no conversation has an image in '{config.images}' ({self.bad_files.summary()})"
            raise UserError(f"{config.where}: {problem}; set images to the folder that the paths begin in")

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        file, offset, length = self.entry(index, "offset", "length")
        entry = parse_json(self.bad_files.read_part(file, offset, length), where=f"byte {offset} of {file}")
        return Conversation(self.key(index), *parse_entry(entry))

    def read_image(self, conversation: Conversation) -> np.ndarray:
        return self._read_image(conversation.image or "")

    def _read_image(self, image: str) -> np.ndarray:
        try:
            return np.asarray(read_image(self.images / image))
        except ImageError as error:
            is_missing = error.reason == "cannot be read" and not (self.images / image).exists()
            raise BadSample("missing image" if is_missing else error.reason, detail=image) from None


def parse_entry(entry: Any) -> tuple[str | None, tuple[Turn, ...]]:
    """The image of an entry of LLaVA's JSON and its turns; BadSample if it breaks a rule, with a reason for each."""
    if entry is BROKEN:
        raise BadSample("broken JSON")
    try:
        messages = [(message["from"], message["value"]) for message in entry[TURNS]]
        image = entry.get("image") or ""
    except (LookupError, TypeError, AttributeError):
        raise BadSample("not a conversation") from None
    if not all(isinstance(text, str) for text in [image, *(text for _, text in messages)]):
        raise BadSample("not a conversation")
    messages = messages[1:] if messages and messages[0][0] == MODEL else messages
    texts, roles = [valid_text(text) for _, text in messages], [role for role, _ in messages]
    in_questions, in_answers = (sum(text.count(IMAGE) for text in texts[first::2]) for first in (0, 1))
    problems = {
        "no human turn": HUMAN not in roles,
        "roles do not alternate": roles != ([HUMAN, MODEL] * len(roles))[: len(roles)],
        "last question without an answer": len(roles) % 2 == 1,
        f"{IMAGE} in an answer": in_answers > 0,
        f"more than one {IMAGE}": in_questions > 1,
        f"{IMAGE} without an image": in_questions > 0 and not image,
        f"image without {IMAGE} in the first question": bool(image) and IMAGE not in "".join(texts[:1]),
        "empty answer": not all(text.strip() for text in texts[1::2]),
    }
    if reason := next((reason for reason, holds in problems.items() if holds), ""):
        raise BadSample(reason)
    texts = [text.replace(IMAGE, "").strip() for text in texts]
    return _image_key(image), tuple(map(Turn, texts[::2], texts[1::2]))


def _image_key(image: str) -> str | None:
    """The path below the folder of images, in one form; BadSample if it leads out of it."""
    path = posixpath.normpath(valid_text(image).replace("\\", "/"))
    if f"{path}/".startswith(("/", "../")) or ":" in path.split("/")[0]:
        raise BadSample("image path outside the folder")
    return path if image else None


class Questions:
    """Three to six questions about each scene or digit; which ones depends on its key alone."""

    fingerprint: Callable[[], str]

    def __init__(self, config: ConversationSourceConfig, *, split: Split, image_size: int, seed: int) -> None:
        kind: Any = config.kind
        images = ImageSourceConfig(config.name, kind=kind, length=config.length, val_fraction=config.val_fraction)
        source = open_image_source(images, split=split, size=image_size, seed=seed)
        self.images = cast(ScenesSource | DigitsSource, source)
        self._numbers = {}
        if isinstance(self.images, DigitsSource):
            self._numbers = {self.images.key(index): index for index in range(len(self.images))}

    def __len__(self) -> int:
        return len(self.images)

    def questions(self, index: int) -> tuple[str, list[Question]]:
        """The key of the image at `index`, and its questions with their kinds."""
        key = self.images.key(index)
        draw = Draw(derive_seed(0, "questions", key), size=self.images.size)
        if isinstance(self.images, ScenesSource):
            return key, choose(scene_questions(self.images.objects(index), draw=draw), draw=draw)
        return key, choose(digit_questions(self.images.labels[index], draw=draw), draw=draw)

    def __getitem__(self, index: int) -> Conversation:
        key, questions = self.questions(index)
        return Conversation(key, key, tuple(Turn(question.text, question.answer) for question in questions))

    def read_image(self, conversation: Conversation) -> np.ndarray:
        key = conversation.key
        return self.images[self._numbers[key] if self._numbers else int(key.rpartition("-")[2])].image_HWC
