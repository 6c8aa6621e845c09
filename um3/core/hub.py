"""Files of models: their folder (local, or of the Hugging Face hub), and loading without running code of a file.

A model folder is input like any other file. All loads of the project go through `load_pretrained` and `read_tensors`.
"""

import argparse
import copy
import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from um3.core.errors import UserError
from um3.core.files import sha256_of, short_hash, write_text
from um3.core.text import printable

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[Path, list[int]]]
"""File and shape of every stored tensor."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
"""The files of a model folder; code and pickles are not downloaded."""
NESTED = ("module", "model", "state_dict")
"""Keys under which published files keep the table, if it is not the whole content."""
CHECKSUMS = "SHA256SUMS"
"""The digests of a folder's weights, as `sha256sum --check` reads them."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
OPTION_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")
OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
"""Values of `attn_implementation` that are torch's own; transformers may fetch code from the hub for any other."""
LFS_POINTER, LFS_BYTES = b"version https://git-lfs", 1024
"""How a git-LFS pointer begins, and the most bytes that it has."""
LAYER_COUNT = re.compile(r"(?:^|\.)(?:num|n|encoder|decoder)_(?:\w+_)?layers?$")
MAX_LAYERS = 10_000
"""Without weights in the folder. With weights, a layer has at least one tensor."""


def model_folder(
    path_or_hub_id: str | Path, *, kind: str = "model", files: Sequence[str] = MODEL_FILES, **options: Any
) -> Path:
    """The local folder of a model; a hub repository is downloaded to the cache unless it is there; UserError without.

    `kind` is the model in the error message, `files` are patterns, `options` are those of `snapshot_download`.
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    reason = ""
    if HUB_ID.fullmatch(str(path_or_hub_id)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(files), **options))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = f" ({type(error).__name__}: {_reason(error)})"
    problem = f"{kind} '{path_or_hub_id}' is neither a local folder nor an accessible Hugging Face repo{reason}"
    raise UserError(f"{problem}; check the path or the hub id")


def load_pretrained(
    loader: Any,
    path_or_hub_id: str | Path,
    *,
    kind: str,
    remedy: str = "restore its files, or use another folder or hub id",
    strict: bool = False,
    shown_as: str | Path = "",
    **options: Any,
) -> Any:
    """`loader.from_pretrained` of a folder or hub id, for every class of transformers: models, configs, tokenizers.

    The folder's Python never runs, no attention kernel is fetched, and weights come from safetensors files. The sizes
    of a model in a folder are compared with the header of its weights before memory is allocated. A head that
    config.json ties to the embedding, but that the weights hold as another tensor, stays a head of its own.

    UserError names the `kind`, the file and value that cannot be used, or the weights that are missing, not finite or
    of other shapes than in config.json, with `strict` also those that it does not describe, and the `remedy`;
    `shown_as` replaces the path in it. With transformers' `gguf_file` the caller compares the sizes (`um3.model.gguf`).
    """
    folder = model_folder(path_or_hub_id, kind=kind, files=["*.json"])
    refuse_lfs_pointers(folder.iterdir())
    is_model = hasattr(loader, "from_config") or hasattr(loader, "_from_config")
    reporter = logging.getLogger("transformers.modeling_utils")
    try:
        shapes = _stored_shapes(folder) if Path(path_or_hub_id).is_dir() else {}
        _check_options(folder, max_layers=len(shapes) or MAX_LAYERS)
        if not is_model:
            loaded = loader.from_pretrained(str(path_or_hub_id), trust_remote_code=False, **options)
            if hasattr(loaded, "encode"):
                loaded.encode("a")  # a tokenizer reads some of its options only when it is used
            return loaded
        if Path(path_or_hub_id).is_dir() and "gguf_file" not in options:
            check_weights(folder)
            options["config"] = _checked_config(loader, folder, shapes, options.get("config"))
        reporter.disabled = True  # its table of mismatches would repeat the errors below
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = loader.from_pretrained(str(path_or_hub_id), trust_remote_code=False, **options)
        floats = ((name, x) for name, x in model.named_parameters() if x.is_floating_point() and not x.is_meta)
        for names, problem in (
            (report["missing_keys"], "the weights lack {} tensors that config.json describes"),
            (report["unexpected_keys"] if strict else (), "the weights hold {} tensors that config.json lacks"),
            ([name for name, *_ in report["mismatched_keys"]], "{} weights have other shapes than in config.json"),
            ([name for name, x in floats if not x.isfinite().all()], "{} weights hold NaN or infinity"),
        ):
            if names:
                some = ", ".join(f"'{name}'" for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ValueError(f"{problem.format(len(names))}: {some}")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # on hostile files transformers and tokenizers raise almost anything
        reason = _reason(error) if "gguf_file" in options else _diagnosis(loader, folder, error)
        raise UserError(f"cannot load the {kind} '{shown_as or path_or_hub_id}' ({reason}); {remedy}") from None
    finally:
        reporter.disabled = False
    return model


def refuse_lfs_pointers(paths: Iterable[Path]) -> None:
    """UserError for a file that git-LFS has not fetched: a clone without it has a pointer of three lines there."""
    for path in paths:
        if path.is_file() and path.stat().st_size <= LFS_BYTES and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{path} is a git-LFS pointer, not the file; run `git lfs pull` in its folder")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, one or the shards of its index; empty without weights."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        return []
    refuse_lfs_pointers([folder / WEIGHTS_INDEX])
    try:
        names = sorted(set(json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / WEIGHTS_INDEX} is damaged ({_reason(error)}); copy the model again") from None
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} of {WEIGHTS_INDEX} does not exist; copy the whole model folder")
    return files


def weights_digest(folder: str | Path) -> str:
    """Fingerprint of a file, or of the weights of a model folder, in one file or in shards; empty without weights."""
    files = [Path(folder)] if Path(folder).is_file() else weight_files(folder)
    if len(files) < 2:
        return sha256_of(files[0])[:16] if files else ""
    return short_hash([(file.name, sha256_of(file)) for file in files])


def write_checksums(folder: Path) -> None:
    """Write the digests of a folder's weights, which `load_pretrained` compares."""
    write_text(folder / CHECKSUMS, "".join(f"{sha256_of(file)}  {file.name}\n" for file in weight_files(folder)))


def check_weights(folder: Path) -> None:
    """UserError if a file of the weights differs from its digest in the folder's SHA256SUMS, if there is one."""
    checksums = folder / CHECKSUMS
    lines = checksums.read_bytes().decode(errors="replace").splitlines() if checksums.is_file() else ()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for file in weight_files(folder):
        if file.name in digests and sha256_of(file) != digests[file.name]:
            remedy = f"copy the model again, or delete {CHECKSUMS} if you changed the weights"
            raise UserError(f"{file} is damaged: its sha256 is not the one in {CHECKSUMS}; {remedy}")


def read_weights(folder: str | Path) -> "dict[str, Tensor]":
    """All tensors of a model folder's safetensors files; raises as `read_tensors` does, also without weights."""
    files = weight_files(folder) or [Path(folder) / WEIGHTS]
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def read_tensors(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of a `.safetensors` file or of a torch file that holds only tensors, on the CPU; UserError if not."""
    import torch
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; set the path to the published weights file, or leave it empty")
    refuse_lfs_pointers([Path(path)])
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # Training scripts store their arguments beside the tensors; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # both raise many kinds for a damaged or hostile file
        raise UserError(f"{path} cannot be read as tensors only ({_reason(error)}); fetch it again") from None
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} has no table of tensors; use the published weights file")
    return dict(content)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Save a tokenizer of transformers. Truncation and padding, which calls leave in it, are not part of the files."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def _reason(error: Exception) -> str:
    """One line for an error of a library: the last line of a strict dataclass's error, the first of any other."""
    from huggingface_hub.errors import StrictDataclassError

    lines = str(error).strip().split("\n")
    line = lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()
    line = line.removeprefix("ValueError: ").removeprefix("TypeError: ")
    return printable(f"{type(error).__name__} {line}" if isinstance(error, LookupError) or not line else line)[:200]


def _diagnosis(loader: Any, folder: Path, error: Exception) -> str:
    """The reason of an error, with the file that causes it if reading the folder's files one by one tells."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, GenerationConfig

    if "Config" in loader.__name__:
        return f"config.json: {_reason(error)}"
    kind = getattr(loader, "config_class", None) or AutoConfig
    probes: dict[str, Callable[[], Any]] = {
        "config.json": lambda: kind.from_pretrained(folder, trust_remote_code=False),
        "generation_config.json": lambda: GenerationConfig.from_pretrained(folder),
        "tokenizer.json": lambda: Tokenizer.from_file(str(folder / "tokenizer.json")),
    }
    for file, read in probes.items():
        if (folder / file).is_file():
            try:
                read()
            except Exception as cause:
                return f"{file}: {_reason(cause)}"
    if "Tokenizer" in loader.__name__:
        has_tokenizer = (folder / "tokenizer.json").is_file()
        return f"{'tokenizer_config.json' if has_tokenizer else 'there is no tokenizer.json'}: {_reason(error)}"
    return _reason(error)


def _check_options(folder: Path, *, max_layers: int) -> None:
    """Refuse option files that are no JSON objects, hold NaN, name a kernel of the hub, or describe too many layers."""
    for path in (folder / name for name in OPTION_FILES):
        if not path.is_file():
            continue
        try:
            options = json.loads(path.read_bytes())
            if not isinstance(options, dict):
                raise ValueError("it must hold an object")
            for name, value in _leaves(options):
                if isinstance(value, float) and math.isnan(value):
                    raise ValueError(f"{name} is NaN")
                if "attn_implementation" in name and value not in OWN_ATTENTION:
                    raise ValueError(f"{name} is {value!r}; only eager and sdpa attention are loaded")
                is_count = type(value) is int and LAYER_COUNT.search(name)
                if is_count and value > max_layers:
                    raise ValueError(f"{name} is {value:,}; the weights hold at most {max_layers:,} layers")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be used: {_reason(error)}; correct it, or copy the model again") from None


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all values in nested dictionaries and lists."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, f"{name}.{key}".removeprefix("."))
    else:
        yield name, values


def _stored_shapes(folder: Path) -> Shapes:
    """File and shape of every tensor in the weights of a folder, from their headers."""
    from safetensors import SafetensorError, safe_open

    shapes: Shapes = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as weights:
                shapes |= {name: (file, weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({_reason(error)}); copy or train the model again") from None
    return shapes


def _checked_config(loader: Any, folder: Path, shapes: Shapes, config: Any) -> Any:
    """The folder's config (or `config`), compared with the weights; their own head is untied."""
    import torch
    from transformers import AutoConfig

    config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not shapes:
        pickled = ", and pytorch_model.bin, a pickle, is not loaded" if any(folder.glob("pytorch_model*.bin")) else ""
        raise ValueError(f"there is no {WEIGHTS}{pickled}; save the model with transformers' save_pretrained")
    build = loader.from_config if hasattr(loader, "from_config") else loader._from_config
    try:
        with torch.device("meta"):
            model = build(copy.deepcopy(config))
    except Exception as error:  # as in load_pretrained
        raise ValueError(f"config.json: {_reason(error)}") from None
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if getattr(config, "quantization_config", None) is None:
        for name, size in sizes.items():
            if name in shapes and size != shapes[name][1]:
                raise ValueError(f"{name} is {size} by config.json and {shapes[name][1]} in the weights")
        if sum(map(math.prod, sizes.values())) > 2 * sum(math.prod(shape) for _, shape in shapes.values()):
            raise ValueError("config.json describes more than twice the weights that are stored")
    for head, embedding in getattr(model, "all_tied_weights_keys", {}).items():
        if head in shapes and embedding in shapes:
            tensors = [read_tensors(shapes[name][0])[name] for name in (head, embedding)]
            if not torch.equal(*tensors):
                logger.warning("%s: config.json ties %s, but the weights hold another; it stays untied", folder, head)
                config.tie_word_embeddings = False
    return config
