"""`python -m eval run [--config FILE] [key=value ...]`: evaluate a run or a model, and skip what is up to date."""

import contextlib
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.command import MODEL_SUFFIXES
from eval.config import PARTS, STAGES, EvalConfig, PartName
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.distributed import device, is_main
from um3.core.errors import UserError
from um3.core.files import folder_lock, sha256_of, short_hash, walk_files
from um3.core.hub import model_folder
from um3.core.log import setup_logging
from um3.core.progress import format_seconds, peak_memory_gib
from um3.core.text import printable

if TYPE_CHECKING:
    from um3.inference.image_pipeline import ImagePipeline

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
    if not config.parts:
        raise UserError(f"no parts to measure; set parts to a list of {', '.join(PARTS)}, or leave it out for all")
    models = {part: model_folders(config, part=part) for part in PARTS if part in config.parts}
    config = with_sources(config)

    @functools.cache
    def load_pipeline(folder: Path) -> "ImagePipeline":
        from downstream import pipelines

        return pipelines.load_pipeline(folder, device=device())

    errors = list[str]()
    with folder_lock(config.results_dir) if is_main() else contextlib.nullcontext():
        for part, folders in models.items():
            request = request_hash(config, part=part, models=folders)
            if config.force or not _is_up_to_date(config.results_dir / f"{part}.json", request=request):
                errors += _evaluate_part(
                    config, part=part, models=folders, load_pipeline=load_pipeline, request=request
                )
    if errors:
        raise UserError(f"everything else was measured, but {'; '.join(errors)}")


def _is_up_to_date(path: Path, *, request: str) -> bool:
    """Whether both files of a part are whole and answer the request; says so, or what is wrong with them."""
    from eval.part_files import read_part

    if not path.exists():
        return False
    try:
        record = read_part(path).record
    except (UserError, OSError) as error:
        print(printable(f"{path.stem}: measured again, because {error}"))
        return False
    if record.get("request") != request:
        return False
    print(f"{path.stem}: {path} is up to date")
    return True


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
            remedy = "run make stage1 first, or set tokenizer.stages (make: QLIP=folder or hub id)"
            raise UserError(f"no visual tokenizer in {config.run}/stage1 or stage2; {remedy}")
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
        name: list(map(sha256_of, walk_files(folder, suffixes=MODEL_SUFFIXES))) for name, folder in models.items()
    }
    sources: dict[str, list[Any]] = {"language": config.texts, "tokenizer": config.images}
    data = [source_fingerprint(source) for source in sources.get(part, config.captioned)]
    paths = {
        "language": [config.language.benchmarks],
        "generation": [config.generation.judge, config.generation.clip],
    }.get(part, [])
    if part == "generation" and config.run:
        paths = [*paths, f"{config.run}/codes/summary.json"]
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


def _evaluate_part(
    config: EvalConfig,
    *,
    part: PartName,
    models: dict[str, Path],
    load_pipeline: Callable[[Path], "ImagePipeline"],
    request: str,
) -> Sequence[str]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from eval.part_files import provenance, write_part
    from eval.tasks import captions, generation, language, tokenizer

    began, path, (folder, *_) = time.monotonic(), config.results_dir / f"{part}.json", models.values()
    disable_progress_bar()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if part == "tokenizer":
        result = tokenizer.evaluate_tokenizers(config, stages=models)
    elif part == "language":
        result = language.evaluate_language(config, model=folder, request=request)
    elif part == "captions":
        result = captions.evaluate_captions(config, pipeline=load_pipeline(folder))
    else:
        result = generation.evaluate_generation(config, model=folder, pipeline=load_pipeline(folder))
    about = provenance(config, began=began)
    # A part with errors is never up to date: the next run must report them again.
    request = "" if result.errors else request
    write_part(path, result, request=request, peak_memory_gib=round(peak_memory_gib(), 3), **about)
    measured = sum(score.value is not None for score in result.scores)
    print(f"{part}: {measured} values in {len(result.scores)} rows, took {format_seconds(about['seconds'])} -> {path}")
    return result.errors
