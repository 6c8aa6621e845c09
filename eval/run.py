"""`python -m eval run [--config FILE] [key=value ...]`: evaluate a run or a model, and skip what is up to date."""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config import PARTS, STAGES, EvalConfig, PartName
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.errors import UserError
from um3.core.files import atomic_file, read_json, sha256_of, short_hash
from um3.core.hub import model_folder
from um3.core.log import setup_logging
from um3.core.progress import format_seconds, peak_memory_gib

if TYPE_CHECKING:
    from eval.scores import PartResult
    from um3.inference.pipeline import UM3Pipeline

# Paths and speed change no value.
FREE_KEYS = ("run", "model", "output_dir", "parts", "num_threads", "force")
DATA_KEYS = ("images", "texts")


def main(arguments: Sequence[str]) -> None:
    """Evaluate what a config asks for; parts that are up to date are skipped."""
    parser = command_parser("python -m eval run", "Evaluate a run or a model.", config="optional")
    config, _ = read_config(EvalConfig, parser, section="eval", arguments=arguments)
    setup_logging()
    evaluate(config)


def evaluate(config: EvalConfig) -> None:
    """Write PART.json, and PART.npz with images for the report, for every part that is not up to date.

    Raises:
        UserError: a model is missing, or a part cannot be measured.
    """
    if not config.run and not config.model:
        raise UserError("no run to evaluate; set run=FOLDER, such as run=runs/demo, or model=FOLDER")
    if not config.run and not config.output_dir:
        raise UserError("no folder for the results; set output_dir=FOLDER, or run=FOLDER for FOLDER/eval")
    models = {part: model_folders(config, part=part) for part in PARTS if part in config.parts}
    config = with_sources(config)
    load_pipeline, errors = functools.cache(_load_pipeline), list[str]()
    for part, folders in models.items():
        request = request_hash(config, part=part, models=folders)
        path = config.results_dir / f"{part}.json"
        if not config.force and path.exists() and read_json(path).get("request") == request:
            print(f"{part}: {path} is up to date")
            continue
        began = time.monotonic()
        result = _evaluate_part(config, part=part, models=folders, load_pipeline=load_pipeline, request=request)
        # A part with errors is never up to date: the next run must report them again.
        request = "" if result.errors else request
        _write_part(config, part=part, result=result, request=request, seconds=time.monotonic() - began)
        errors += result.errors
    if errors:
        raise UserError(f"everything else was measured, but {'; '.join(errors)}")


def with_sources(config: EvalConfig) -> EvalConfig:
    """Add the sources that the run was trained on where the config lists none.

    Raises:
        UserError: the run's sources are unknown, or no source has captions that a part needs.
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
    if (parts := sorted({"captions", "generation"} & set(config.parts))) and not config.captioned:
        raise UserError(f"the part {parts[0]} needs captions, but no image source has any; add one or set parts=")
    return config


def model_folders(config: EvalConfig, *, part: PartName) -> dict[str, Path]:
    """The model folders that a part measures, by name.

    Raises:
        UserError: a model is missing; the message names the phase that trains it.
    """
    if part == "tokenizer":
        if named := config.tokenizer.stages:
            return {name: model_folder(path, kind="visual tokenizer") for name, path in named.items()}
        folders = {stage: Path(config.run) / stage / "model" for stage in STAGES}
        trained = {stage: folder for stage, folder in folders.items() if (folder / "config.json").is_file()}
        if not trained:
            raise UserError(f"no visual tokenizer in {config.run}/stage1 or stage2; run make stage1 first")
        return trained
    if config.model:
        return {"um3": model_folder(config.model, kind="language model" if part == "language" else "UM3 model")}
    folder = Path(config.run) / "um3" / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make um3 first, or set parts=[tokenizer]")
    return {"um3": folder}


def request_hash(config: EvalConfig, *, part: PartName, models: dict[str, Path]) -> str:
    """Hash everything that the values of a part depend on: settings, the models' weights and JSON files, data files."""
    from data_mix.sources.fingerprint import source_fingerprint
    from data_mix.sources.image_sources import ImageSourceConfig
    from eval.tasks.classification_data import data_hash

    skipped = {*FREE_KEYS, *DATA_KEYS, *PARTS} - {part}
    settings = {key: value for key, value in to_dict(config).items() if key not in skipped}
    weights = {
        name: [sha256_of(file) for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".json")]
        for name, folder in models.items()
    }
    sources: dict[str, list[Any]] = {"language": config.texts, "tokenizer": config.images}
    data = [source_fingerprint(source) for source in sources.get(part, config.captioned)]
    paths = [config.language.benchmarks] if part == "language" else []
    if part == "tokenizer":
        classification = config.tokenizer.classification
        tables = [ImageSourceConfig(name=table.name, path=table.path) for table in classification if table.label_column]
        data += [source_fingerprint(table) for table in tables]
        paths = [path for labelled in classification for path in (labelled.class_names, labelled.templates)]
        paths += [labelled.path for labelled in classification if not labelled.label_column]
        paths += [config.tokenizer.perceptual.backbone, config.tokenizer.perceptual.heads]
        paths += [_source_file(target) for target in config.tokenizer.external.values()]
    return short_hash(part, settings, weights, data, [data_hash(path) for path in paths])


def _source_file(target: str) -> str:
    """The source file of the module in package.module:function; empty if it is not found."""
    try:
        spec = importlib.util.find_spec(target.partition(":")[0])
    except (ImportError, ValueError):  # reported when the tokenizer is opened
        return ""
    return (spec and spec.origin) or ""


def _load_pipeline(folder: Path) -> "UM3Pipeline":
    from um3.core.distributed import device
    from um3.inference.pipeline import UM3Pipeline

    return UM3Pipeline.from_pretrained(folder, device=device())


def _evaluate_part(
    config: EvalConfig,
    *,
    part: PartName,
    models: dict[str, Path],
    load_pipeline: Callable[[Path], "UM3Pipeline"],
    request: str,
) -> "PartResult":
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if part == "tokenizer":
        from eval.tasks.tokenizer import evaluate_tokenizers

        return evaluate_tokenizers(config, stages=models)
    (folder,) = models.values()
    if part == "language":
        from eval.tasks.language import evaluate_language

        return evaluate_language(config, model=folder, request=request)
    if part == "captions":
        from eval.tasks.captions import evaluate_captions

        return evaluate_captions(config, pipeline=load_pipeline(folder))
    from eval.tasks.generation import evaluate_generation

    return evaluate_generation(config, model=folder, pipeline=load_pipeline(folder))


def _write_part(config: EvalConfig, *, part: PartName, result: "PartResult", request: str, seconds: float) -> None:
    import numpy as np

    from eval.scores import write_scores
    from um3.core.metrics import commit, machine, versions

    path = config.results_dir / f"{part}.json"
    with atomic_file(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **result.images)  # type: ignore[arg-type]
    write_scores(
        path,
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
    print(f"{part}: {measured} values in {len(result.scores)} rows, took {format_seconds(seconds)} -> {path}")
