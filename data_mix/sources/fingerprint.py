"""A short name for the data of a source; it is kept beside what is made of the data, to notice when the data change."""

import os
from pathlib import Path

from data_mix.sources.config import SourceConfig
from data_mix.sources.files import all_files
from um3.core.config import to_dict
from um3.core.files import short_hash


def source_fingerprint(config: SourceConfig, *values: str | int) -> str:
    """Short hash of a source's config, of `values`, and of the name, size and time of every file that it reads.

    The weight does not count: how often a sample is drawn does not change the sample.
    """
    settings = to_dict(config)
    del settings["weight"]
    # Settings that are not used do not count either, so that a new setting keeps what was made before it.
    settings = {name: value for name, value in settings.items() if value not in ("", 0)}
    files = [] if config.kind == "hub" else _file_states(config.path)
    return short_hash(settings, values, files, _file_states(settings.get("captions", "")))


def _file_states(path: str) -> list[tuple[str, int, int]]:
    root = path if Path(path).is_dir() else Path(path).parent
    stats = [(os.path.relpath(file, root), file.stat()) for file in all_files(path)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
