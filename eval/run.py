"""`python -m eval run [--config FILE] [key=value ...]`: evaluate a run or a model, and skip what is up to date."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config import PARTS, STAGES, EvalConfig, PartName, TokenizerConfig
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.errors import UserError
from um3.core.files import atomic_file, read_json, sha256_of
from um3.core.log import setup_logging
from um3.core.progress import format_seconds, peak_memory_gib

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

# Where things lie and how fast they are changes no value.
FREE_KEYS = ("run", "model", "out", "parts", "num_threads", "force")


def main(arguments: Sequence[str]) -> None:
    """Evaluate what a config asks for; returns at once where all of it is done already."""
    parser = command_parser("python -m eval run", "Evaluate a run or a model.", config="optional")
    config, _ = read_config(EvalConfig, parser, section="eval", arguments=arguments)
    setup_logging()
    evaluate(config)


def evaluate(config: EvalConfig) -> None:
    """Write RUN/eval/PART.json, and PART.npz with the images to look at, for every part that is not up to date.

    Raises:
        UserError: a model is missing, or a part cannot be measured.
    """
    if not config.run and not config.model:
        raise UserError("which run is to be evaluated? set run=FOLDER, such as run=runs/demo")
    if not config.run and not config.out:
        raise UserError("where are the results to go? set out=FOLDER, or run=FOLDER for FOLDER/eval")
    inputs = {part: part_inputs(config, part=part) for part in PARTS if part in config.parts}
    config = with_sources(config)
    load_pipeline = functools.cache(lambda: _load_pipeline(config))
    for part, folders in inputs.items():
        request = request_of(config, part=part, folders=folders)
        path = out_folder(config) / f"{part}.json"
        if not config.force and path.exists() and read_json(path).get("request") == request:
            print(f"{part}: {path} is up to date")
            continue
        _run_part(config, part=part, load_pipeline=load_pipeline, folders=folders, request=request)


def with_sources(config: EvalConfig) -> EvalConfig:
    """The config with the run's own sources where it names none.

    Raises:
        UserError: the run does not say what it was trained on, or no source has the captions that a part needs.
    """
    from data_mix.sources.image_sources import ImageSourceConfig
    from data_mix.sources.text import TextSourceConfig
    from eval.tasks.validation_data import trained_on

    images, texts = config.images, config.texts
    if not images and set(config.parts) - {"language"}:
        images = trained_on(config.run, phase="stage1", key="sources", kind=ImageSourceConfig)
    if not texts and "language" in config.parts and config.run:
        texts = trained_on(config.run, phase="um3", key="texts", kind=TextSourceConfig)
    config = dataclasses.replace(config, images=images, texts=texts)
    if (asking := sorted({"captions", "generation"} & set(config.parts))) and not config.captioned:
        raise UserError(f"no image source has captions, which {asking[0]} needs; add one, or set parts without it")
    return config


def out_folder(config: EvalConfig) -> Path:
    """Where the results go."""
    return Path(config.out) if config.out else Path(config.run) / "eval"


def part_inputs(config: EvalConfig, *, part: PartName) -> dict[str, Path]:
    """The model folders a part is measured on, by name.

    Raises:
        UserError: none is there; the message names the phase that makes it.
    """
    if part == "tokenizer":
        named = {name: Path(path) for name, path in config.tokenizer.stages.items()}
        found = named or {stage: Path(config.run) / stage / "model" for stage in STAGES}
        found = {name: path for name, path in found.items() if named or (path / "config.json").is_file()}
        if not found:
            raise UserError(f"no visual tokenizer in {config.run}/stage1 or stage2; run make stage1 first")
        absent = [path for path in found.values() if not (path / "config.json").is_file()]
        if absent:
            raise UserError(f"no visual tokenizer in {absent[0]}; correct tokenizer.stages")
        return found
    folder = model_folder(config)
    if part == "language" and config.model:
        return {"model": downloaded(config.model)}
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make um3 first, or set parts=[tokenizer]")
    return {"um3": folder}


def model_folder(config: EvalConfig) -> Path:
    """The UM3 model's folder."""
    return Path(config.model) if config.model else Path(config.run) / "um3" / "model"


def downloaded(path_or_hub_id: str) -> Path:
    """The folder of a language model: itself, or where the hub's files are kept.

    Raises:
        UserError: a folder without a model, or no such hub id (or no hub).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(path_or_hub_id).exists():
        if not (Path(path_or_hub_id) / "config.json").is_file():
            raise UserError(f"no language model in {path_or_hub_id} (no config.json); correct the model's folder")
        return Path(path_or_hub_id)
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"no language model '{path_or_hub_id}': it is no folder, and no hub id that can be reached ({reason})"
        ) from None


def request_of(config: EvalConfig, *, part: PartName, folders: dict[str, Path]) -> str:
    """What a part was asked for, in a few characters: its settings, the models' weights and .json files, and the
    data's files."""
    from data_mix.sources.fingerprint import origin

    values = {key: value for key, value in to_dict(config).items() if key not in FREE_KEYS}
    values = {key: value for key, value in values.items() if key not in PARTS or key == part}
    values.pop("images" if part == "language" else "texts")
    models = {
        name: [sha256_of(file) for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".json")]
        for name, folder in folders.items()
    }
    sources: dict[str, list[Any]] = {"language": config.texts, "tokenizer": config.images}
    data: list[Any] = [origin(source) for source in sources.get(part, config.captioned)]
    if part == "language" and config.language.benchmarks:
        files = [file for file in sorted(Path(config.language.benchmarks).rglob("*")) if file.is_file()]
        data += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if part == "tokenizer":
        data.append(_files_read(config.tokenizer))
    described = json.dumps([part, values, models, data], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _files_read(part: TokenizerConfig) -> dict[str, Any]:
    """What the tokenizer part reads besides models and images, each in a few characters; nothing of what is missing."""
    from data_mix.sources.fingerprint import origin
    from data_mix.sources.image_sources import ImageSourceConfig
    from eval.tasks.classification_data import listing_sha256

    folders = [str(Path(own.path) / split) for own in part.classification for split in ("train", "val")]
    tables = [own for own in part.classification if own.label_column]
    texts = [file for own in part.classification for file in (own.class_names, own.templates)]
    texts += [_source_file(target) for target in part.others.values()]
    weights = [Path(file) for file in (part.perceptual.backbone, part.perceptual.heads)]
    return (
        {folder: listing_sha256(folder) for folder in folders}
        | {own.path: origin(ImageSourceConfig(name=own.name, path=own.path)) for own in tables}
        | {file: sha256_of(file) for file in texts if Path(file).is_file()}
        | {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in weights if file.is_file()}
    )


def _source_file(target: str) -> str:
    """The file of the module in package.module:function; empty if it has none."""
    try:
        found = importlib.util.find_spec(target.partition(":")[0])
    except (ImportError, ValueError):  # said when it is opened
        return ""
    return (found and found.origin) or ""


def _load_pipeline(config: EvalConfig) -> "UM3Pipeline":
    from um3.core.distributed import device
    from um3.inference.pipeline import UM3Pipeline

    return UM3Pipeline.from_pretrained(model_folder(config), device=device())


def _run_part(
    config: EvalConfig,
    *,
    part: PartName,
    load_pipeline: Callable[[], "UM3Pipeline"],
    folders: dict[str, Path],
    request: str,
) -> None:
    import numpy as np
    import torch
    from transformers.utils.logging import disable_progress_bar

    from eval.scores import write_scores
    from eval.tasks import parts
    from eval.tasks import tokenizer as tokenizer_part
    from um3.core.provenance import commit, machine, versions

    disable_progress_bar()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    out, began = out_folder(config), time.monotonic()
    if part == "tokenizer":
        result = tokenizer_part.tokenizer(config, stages=folders)
    elif part == "language":
        result = parts.language(config, model=str(next(iter(folders.values()))), folder=out, request=request)
    elif part == "captions":
        result = parts.captions(config, pipeline=load_pipeline())
    else:
        result = parts.generation(config, pipeline=load_pipeline())
    with atomic_file(out / f"{part}.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, **result.images)  # type: ignore[arg-type]
    seconds = time.monotonic() - began
    write_scores(
        out / f"{part}.json",
        result.scores,
        samples=result.samples,
        request=request,
        seconds=round(seconds, 1),
        peak_memory_gib=round(peak_memory_gib(), 3),
        config=to_dict(config),
        commit=commit(),
        versions=versions(),
        machine=machine(),
    )
    measured = sum(score.value is not None for score in result.scores)
    print(f"{part}: {measured} values of {len(result.scores)} rows in {format_seconds(seconds)} -> {out / part}.json")
