"""Which files a source reads, how its samples are named, and which kind of source a path is.

This is the one place for these rules; every reader uses it:
- A path is a file, a folder (searched with all folders below it) or a glob. Files are read in the order of their paths.
- A sample is named by its file, relative to the folder that was asked for, and its place in the file (`b/0.tar#17`).
- A path owner/name that does not exist on this disk is a data set of the Hugging Face hub.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from data_mix.sources.config import ImageKind, ImageSourceConfig, SourceConfig, TextKind, TextSourceConfig
from um3.core.errors import UserError

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz")
FileKinds = Mapping[str, tuple[str, ...]]
# The suffixes of each kind. A folder without files of IMAGE_KINDS is a folder of images.
IMAGE_KINDS: FileKinds = {"parquet": (".parquet",), "webdataset": (".tar",)}
TEXT_KINDS: FileKinds = {"parquet": (".parquet",), "jsonl": JSONL, "txt": (".txt",)}
HUB_DATASET = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]+))?")


def list_files(
    path: str, *, suffixes: Sequence[str], source: str, any_case: bool = False, hidden: bool = True
) -> list[Path]:
    """The files at a path whose names end in one of `suffixes`, sorted; UserError if there are none.

    any_case: also take suffixes in upper case. hidden: also take names of files and folders that begin with a dot.
    """
    files = sorted(
        file
        for file in _paths(path)
        if (file.name.lower() if any_case else file.name).endswith(tuple(suffixes))
        and (hidden or not any(part.startswith(".") for part in file.relative_to(path).parts))
        and file.is_file()
    )
    if not files:
        raise UserError(f"source '{source}': no {' or '.join(suffixes)} file at '{path}'; give a file, folder or glob")
    return files


def all_files(path: str) -> list[Path]:
    """Every file at a path, sorted; none at an empty path."""
    return sorted(file for file in _paths(path) if file.is_file())


def _paths(path: str) -> Iterable[Path]:
    if not path or Path(path).is_file():
        return [Path(path)] if path else []
    if Path(path).is_dir():
        return Path(path).rglob("*")
    return map(Path, glob.glob(path, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)


def file_keys(files: Sequence[Path], path: str) -> list[str]:
    """Name of each file, relative to the folder that was asked for, else to the deepest folder that holds them all.

    So no two files share a name, and a data set that moves as a whole keeps its names and splits.
    """
    root = path if Path(path).is_dir() else os.path.commonpath([file.parent for file in files])
    return [file.relative_to(root).as_posix() for file in files]


def looks_like_hub(path: str) -> bool:
    """Whether `path` is owner/name, with or without @revision and :config, and does not exist on this disk."""
    return HUB_DATASET.fullmatch(path) is not None and not Path(path).exists()


def hub_place(path: str) -> tuple[str, str | None, str | None]:
    """Name, revision (commit, branch or tag) and config of owner/name@revision:config; None for a missing part."""
    if (match := HUB_DATASET.fullmatch(path)) is None:
        raise UserError(f"'{path}' is not a Hugging Face data set; write owner/name, owner/name@revision or :config")
    name, revision, config = match.groups()
    return name, revision, config


def image_kind(config: ImageSourceConfig) -> ImageKind:
    """`config.kind`; `auto` is derived from the path, or else from the name.

    UserError if the kind is unclear, or does not fit the path or `stream`.
    """
    default = config.name if config.name in ("scenes", "digits") else ""
    return cast(ImageKind, _kind(config, IMAGE_KINDS, generated=("scenes", "digits"), default=default))


def text_kind(config: TextSourceConfig) -> TextKind:
    """`config.kind`; `auto` is derived from the path. The errors are those of `image_kind`."""
    return cast(TextKind, _kind(config, TEXT_KINDS, generated=("python_docs",), default="python_docs"))


def _kind(config: SourceConfig, file_kinds: FileKinds, *, generated: Sequence[str], default: str) -> str:
    kind = config.kind
    if kind == "auto":
        kind = _kind_of_path(config, file_kinds) if config.path else default
    if not kind:
        raise UserError(f"{config.where} has no path; give one, or set kind to {' or '.join(generated)}")
    if bool(config.path) == (kind in generated):
        raise UserError(
            f"{config.where}: kind={kind} {'takes no' if config.path else 'needs a'} path; set path or kind"
        )
    if config.stream and kind != "hub":
        raise UserError(f"{config.where}: stream={config.stream} is for kind=hub, not kind={kind}; set stream=0")
    return kind


def _kind_of_path(config: SourceConfig, file_kinds: FileKinds) -> str:
    path, is_folder = config.path, Path(config.path).is_dir()
    names = [file.name for file in Path(path).rglob("*")] if is_folder else [path]
    kinds = [kind for kind, suffixes in file_kinds.items() if any(name.endswith(suffixes) for name in names)]
    if len(kinds) > 1 and file_kinds is IMAGE_KINDS:
        raise UserError(f"{config.where}: both .parquet and .tar files are there; set kind")
    if kinds:
        return kinds[0]
    if is_folder and file_kinds is IMAGE_KINDS:
        return "folder"
    if looks_like_hub(path):
        return "hub"
    suffixes = ", ".join(suffix for group in file_kinds.values() for suffix in group)
    raise UserError(
        f"{config.where}: neither a folder nor {suffixes} (file, folder or glob) nor a Hugging Face data set "
        "(owner/name); check the path or set kind"
    )
