"""What data are made from, in a few characters: kept beside what is made, so that new data are not taken for old."""

import glob
import hashlib
import json
import os
from pathlib import Path

from data_mix.sources.image_sources import ImageSourceConfig
from data_mix.sources.text import TextSourceConfig
from um3.core.config import to_dict


def origin(config: ImageSourceConfig | TextSourceConfig, *values: str | int) -> str:
    """Short hash of a source's config, of `values`, and of the place, size and time of every file it reads.

    The weight is left out: how often a sample is drawn does not change what it is.
    """
    settings = to_dict(config)
    settings.pop("weight")
    # Settings that came later are left out where they are not used: what was made before them stays valid.
    settings = {
        name: value for name, value in settings.items() if value or name not in ("adapter", "captions", "stream")
    }
    captions = [_files(settings["captions"])] if "captions" in settings else []
    files = [] if config.kind == "hub" else _files(config.path)
    described = json.dumps([settings, *values, files, *captions], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _files(path: str) -> list[tuple[str, int, int]]:
    """The files of a path (file, folder or glob); none for a source that is generated or comes from the hub."""
    place = Path(path)
    found = place.rglob("*") if path and place.is_dir() else map(Path, glob.glob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
    root = place if place.is_dir() else place.parent
    stats = [(os.path.relpath(file, root), file.stat()) for file in sorted(found) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
