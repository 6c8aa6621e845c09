"""The one rule for what is read: which files, how samples are named, and what text, lines, records and pairs are.

Every reader of `data_mix.sources` follows it, and it has one test (tests/data_mix/sources/test_rule.py):
- Files: a path that exists is a file or a folder, never a pattern; another path is a glob. A folder is searched with
  the folders below it, by the rule of `um3.core.files.walk_files`: names that begin with a dot are passed over (also in
  a tar), links are followed, suffixes are compared without case. Files are read in the order of their paths. A path
  owner/name that does not exist on this disk is a data set of the Hugging Face hub.
- Keys: a sample is named by its file, relative to the folder that was asked for, and its place in it (`b/0.tar#17`).
- Lines end at \\n, \\r\\n and \\r only; of JSON lines, at \\n.
- Text that UTF-8 cannot hold becomes U+FFFD in captions, documents and keys (`um3.core.text.valid_text`). Bytes that
  are not UTF-8 make a record, a caption or a text file unreadable.
- Records: one that is null, blank, of another type, not JSON or nested too deeply is skipped and counted; with
  skip_bad_files=false it is an error.
- Pairs: names match exactly, else after Unicode normalisation (NFC) and with / for \\; of an image name, only the
  suffix is dropped. All captions of an image are kept, in their order. In a tar, the last member of a name counts.
- Counts: every source reports what it does not use, by reason with an example, when it is opened (`BadFiles.report`).
"""

import glob
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from data_mix.samples import BadSample
from data_mix.sources.bad_files import BadFiles, ResultT
from data_mix.sources.config import ImageSourceConfig, SourceConfig
from um3.core.errors import UserError
from um3.core.files import parse_json, walk_files

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz")
CAPTION_SUFFIXES = (".parquet", *JSONL)
FILE_KINDS = {"parquet": (".parquet",), "webdataset": (".tar",), "jsonl": JSONL, "txt": (".txt",)}
FILE_KINDS |= {"llava": (".json", ".jsonl")}
IMAGE_KINDS = ("parquet", "webdataset")  # a folder without files of these kinds is a folder of images
TEXT_KINDS = ("parquet", "jsonl", "txt")
BLANK = "blank"  # the reason of a line or document without text
PathT = TypeVar("PathT", str, Path)
HUB_DATASET = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]+))?")


def list_files(path: str, *, suffixes: Sequence[str], source: str) -> list[Path]:
    """The files at a path whose names end in one of `suffixes`, sorted; UserError if there are none."""
    if Path(path).is_dir():
        files = walk_files(path, suffixes=suffixes)
    else:
        names = [path] if Path(path).exists() else glob.glob(path, recursive=True)  # noqa: PTH207 (absolute patterns)
        files = sorted(Path(name) for name in names if name.lower().endswith(tuple(suffixes)) and Path(name).is_file())
    if not files:
        raise UserError(f"source '{source}': no {' or '.join(suffixes)} file at '{path}'; give a file, folder or glob")
    return files


def file_keys(files: Sequence[PathT], path: str) -> dict[PathT, str]:
    """Name of each file, relative to the folder that was asked for, else to the deepest folder that holds them all."""
    root = Path(path) if Path(path).is_dir() else os.path.commonpath([Path(file).parent for file in files])
    prefix = os.path.join(root, "")
    return {file: str(file).removeprefix(prefix) for file in files}


def match_names(names: Iterable[str], others: Mapping[str, object]) -> dict[str, str]:
    """For each of `names` that has one, its equal in `others`: exactly equal, else equal once normalised."""
    names = list(names)
    matches = {name: name for name in names if name in others}
    if len(matches) < len(others) and len(matches) < len(names):
        rest = {_normalised(other): other for other in others if other not in matches}
        wanted = {name: _normalised(name) for name in names if name not in matches}
        matches |= {name: rest[normalised] for name, normalised in wanted.items() if normalised in rest}
    return matches


def _normalised(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def looks_like_hub(path: str) -> bool:
    """Whether `path` is owner/name, with or without @revision and :config, and does not exist on this disk."""
    return HUB_DATASET.fullmatch(path) is not None and not Path(path).exists()


def hub_place(path: str) -> tuple[str, str | None, str | None]:
    """Name, revision (commit, branch or tag) and config of owner/name@revision:config; None for a missing part."""
    if (match := HUB_DATASET.fullmatch(path)) is None:
        raise UserError(f"'{path}' is not a Hugging Face data set; write owner/name, owner/name@revision or :config")
    name, revision, config = match.groups()
    return name, revision, config


def source_kind(config: SourceConfig) -> str:
    """`config.kind`; `auto` is derived from path or name. UserError if unclear or unfit for the path or `stream`."""
    is_image, kind = isinstance(config, ImageSourceConfig), config.kind
    generated = ("scenes", "digits") if is_image else ("python_docs",)
    if kind == "auto" and config.path:
        kind = _kind_of_path(config, IMAGE_KINDS if is_image else TEXT_KINDS)
    elif kind == "auto":
        kind = next((name for name in generated if name == config.name or not is_image), "")
    if not kind:
        raise UserError(f"{config.where} has no path; give one, or set kind to {' or '.join(generated)}")
    if bool(config.path) == (kind in generated):
        verb = "takes no" if config.path else "needs a"
        raise UserError(f"{config.where}: kind={kind} {verb} path; set path or kind")
    if config.stream and kind != "hub":
        raise UserError(f"{config.where}: stream={config.stream} is for kind=hub, not kind={kind}; set stream=0")
    return kind


def _kind_of_path(config: SourceConfig, kinds: Sequence[str]) -> str:
    path, is_folder, is_image = config.path, Path(config.path).is_dir(), kinds is IMAGE_KINDS
    suffixes = [suffix for kind in kinds for suffix in FILE_KINDS[kind]]
    names = [file.name.lower() for file in walk_files(path, suffixes=suffixes)] if is_folder else [path.lower()]
    found = [kind for kind in kinds if any(name.endswith(FILE_KINDS[kind]) for name in names)]
    if len(found) > 1 and is_image:
        raise UserError(f"{config.where}: both .parquet and .tar files are there; set kind")
    if found or (is_folder and is_image) or looks_like_hub(path):
        return found[0] if found else "folder" if is_folder else "hub"
    problem = "cannot tell what it is" if Path(path).exists() else "there is no such file or folder"
    allowed = f"a folder, {', '.join(suffixes)} (file, folder or glob) or a Hugging Face data set (owner/name)"
    raise UserError(f"{config.where}: {problem}; give {allowed}, or set kind")


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its byte offset; a compressed file is unpacked."""
    offset = 0
    with file.open("rb") as packed:
        compression = COMPRESSIONS.get(file.suffix.lower())
        lines = packed if compression is None else io.BufferedReader(pa.input_stream(packed, compression=compression))
        for line in lines:
            yield offset, line
            offset += len(line)


def read_records(
    file: Path, use: Callable[[dict[str, Any]], ResultT], *, reason: str, bad_files: BadFiles
) -> Iterator[tuple[int, ResultT]]:
    """Byte offset of each line, and what `use` makes of its object; a line that is none or for which it raises is
    counted, for BadSample with its own reason."""
    for number, (offset, line) in enumerate(read_lines(file), start=1):
        try:
            if not line.strip():
                raise BadSample(BLANK)
            yield offset, use(parse_json(line, where="it", kind=dict))
        except BadSample as error:
            bad_files.count(error.reason, f"{file}:{number}")
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            bad_files.skip_record(reason, f"{file}:{number} ({error})")
