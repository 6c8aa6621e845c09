"""A short name for the data of a source; it is kept beside what is made of the data, to notice when the data change."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_mix.sources.config import ConversationSourceConfig, ImageSourceConfig, SourceConfig
from data_mix.sources.files import CAPTION_SUFFIXES, FILE_KINDS, file_keys, list_files, source_kind
from data_mix.sources.image_folder import COCO_FILE, list_folder
from data_mix.sources.presets import apply_preset
from um3.core.config import to_dict
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.images import SUFFIXES

CONTENT_FILES = 10_000  # of no more files, the ends are read as well
CONTENT_BYTES = 2**16  # of each: all of a caption, the statistics of a parquet file, the last captions of a tar


def source_fingerprint(config: SourceConfig, *values: str | int) -> str:
    """Short hash of a source's config, of `values`, and of name, size and (of few) content of every file that is read.

    Not of the weight: how often a sample is drawn does not change the sample. Not of times and the folder of files on
    this disk: data may move. Not of settings that are not used: a new setting keeps what was made before it.
    """
    unused = ("weight", "images")  # of conversations, the text alone
    settings = {
        name: value for name, value in to_dict(config).items() if name not in unused and value not in ("", 0, [])
    }
    read: dict[str, list[tuple[str, int, str]]] = {}  # the files stand in place of their paths
    for path, files in _files_read(config):
        read[path] = []
        for file, name in file_keys(files, path).items():
            size, content = file.stat().st_size, b""
            if len(files) <= CONTENT_FILES:
                with contextlib.suppress(PermissionError), file.open("rb") as data:
                    data.seek(max(0, size - CONTENT_BYTES))
                    content = data.read()
            read[path].append((name, size, hashlib.sha256(content).hexdigest()))
    return short_hash({name: read.get(str(value), value) for name, value in settings.items()}, values)


def _files_read(config: SourceConfig) -> Iterator[tuple[str, Sequence[Path]]]:
    """A path with the files at it that are read: those of the data, and those of captions in files of their own."""
    with contextlib.suppress(UserError):  # a path does not exist, which the reader reports
        if isinstance(config, ConversationSourceConfig):
            if config.kind == "llava":
                yield config.path, list_files(config.path, suffixes=FILE_KINDS["llava"], source=config.name)
            return
        config = apply_preset(config)
        kind = source_kind(config)
        if isinstance(config, ImageSourceConfig):
            if config.captions and config.has_captions:
                yield config.captions, list_files(config.captions, suffixes=CAPTION_SUFFIXES, source=config.name)
            if kind == "folder":
                images, sidecars, metadata = list_folder(config)
                yield config.path, [*map(Path, (*images, *sidecars.values(), *metadata))]
        if suffixes := (FILE_KINDS | {"coco": (*SUFFIXES, COCO_FILE)}).get(kind):
            yield config.path, list_files(config.path, suffixes=suffixes, source=config.name)
