"""The folder of a training phase: whether its result is up to date and whole, and what it was made from.

    config.yaml     the resolved config
    done.json       written last: config, inputs, data, the files of the result; time, memory, versions

This module does not import torch: a phase that is up to date must end at once.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_mix.sources.fingerprint import source_fingerprint
from um3.core.config import differences, load_config, save_config, to_dict, with_defaults
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.files import read_json, sha256_of, short_hash, walk_files, write_json
from um3.core.hub import HUB_ID, weights_digest

logger = logging.getLogger(__name__)

# Settings that a resumed run may change without becoming another run: they change no result.
FREE_SETTINGS = (
    *("loop.log_every_steps", "loop.save_every_steps", "loop.keep_", "loop.num_threads", "loop.loggers"),
    *("loop.micro_batch_size", "engine.", "text_validation.alarm_above", "evaluate.", "validation"),
)
# Files may move: their content is compared by fingerprint.
FREE_FOLDERS = (
    *("loop.output_dir", "init_from:", "model.init_from:", "model.base_model:", "base_model:", "language_model:"),
    *("model.encoder_weights:", "text.weights:", "text_encoder.name:", "perceptual."),
    *("visual_tokenizer:", "data.codes:", "text_features:"),
)
FREE_SOURCE_KEYS = ("path", "captions", "images")
FINGERPRINTS = {"inputs": "another model", "data": "other files", "fingerprints": "other data or vocabulary"}
"""Parts of a run's record beside its config, and what a difference in one means."""
RESULT_FOLDERS = ("model", "adapter")
EDITABLE = ("README.md", "generation_config.json")
"""Files of a model that its user may edit; of these only the existence is checked."""
WHOLE_BYTES = 2**30
"""Of larger files only the size and the first MiB, the header of safetensors, are compared."""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object with its own sha256, atomically."""
    write_json(path, record | {"sha256": _digest(record)})


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote; UserError if it is missing or was changed."""
    record: dict[str, Any] = read_json(path, keys=["sha256"])
    if record.pop("sha256") != _digest(record):
        raise UserError(f"{path} is not as it was written; restore it, or delete it and run the phase again")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def is_done(config: Any, *, inputs: dict[str, str]) -> bool:
    """True if the phase's folder holds the whole result of this config and these inputs.

    A result that lacks files, or has damaged ones, is reported; the phase makes it again from its last checkpoint, or
    stops if there is none. It also resumes from there for another `loop.max_steps`. UserError if the folder is that of
    a run with other settings, inputs or data; a folder without checkpoint and result is that of no run.
    """
    folder, new = Path(config.loop.output_dir), {"config": to_dict(config), "inputs": inputs}
    config_file, done_file = folder / "config.yaml", folder / "done.json"
    has_checkpoints = any((folder / "checkpoints").glob("step-*[0-9]"))
    if config_file.exists() and (has_checkpoints or done_file.exists() or (folder / "model").exists()):
        if not config_file.read_bytes().strip():
            raise UserError(f"{config_file} is empty; delete it: the checkpoints and done.json hold the settings too")
        old = {"config": to_dict(load_config(type(config), path=config_file))}
        refuse_other_run(config_file, old, new, folder=folder)
    if not done_file.exists():
        if (folder / "model").exists() and not config_file.exists() and not has_checkpoints:
            raise UserError(f"{folder}/model exists already without done.json; use another RUN=, or delete {folder}")
        return False
    record = read_record(done_file)
    record["config"] = with_defaults(type(config), record["config"], origin=str(done_file))
    sections = ("data", "text_validation")
    if any(record["config"].get(name) != new["config"].get(name) for name in sections):
        new["data"] = data_fingerprints(config)  # only if paths differ: it lists all files
    refuse_other_run(done_file, record, new, folder=folder, steps=record["steps"])
    damaged = damaged_files(folder, record["files"])
    if damaged and not has_checkpoints:
        raise UserError(f"{folder} lacks {damaged[0]}, or it is damaged; restore it, or delete {folder} to train again")
    if damaged and is_main():
        print(f"{folder}: {', '.join(damaged)} missing or damaged; making the result again from the last checkpoint")
    steps, max_steps = record["config"]["loop"]["max_steps"], config.loop.max_steps
    if steps != max_steps and not has_checkpoints:
        raise UserError(f"{folder} has no checkpoint to resume from; set loop.max_steps={steps}, or use another RUN=")
    return not damaged and steps == max_steps


def refuse_other_run(
    place: Path, old: dict[str, Any], new: dict[str, Any], *, folder: Path, steps: int | None = None
) -> None:
    """Raise UserError if the record `old`, found at `place`, is that of another run than `new`, which has `folder`.

    Both hold "config" and `FINGERPRINTS`, of which those in both are compared. `loop.max_steps` may differ unless it is
    below the `steps` that the old run has taken.
    """
    changed: list[str] = []
    if "config" in old and "config" in new:
        lines = differences(_without_places(old["config"]), _without_places(new["config"]))
        is_short = steps is not None and new["config"]["loop"]["max_steps"] < steps
        free = (*FREE_SETTINGS, *FREE_FOLDERS, *(() if is_short else ("loop.max_steps:",)))
        changed += [line for line in lines if not line.startswith(free)]
    for part, meaning in FINGERPRINTS.items():
        lines = differences(old[part], new[part]) if part in old and part in new else []
        prefix = "" if part == "data" else f"{part}."  # names of data begin with their section
        changed += [f"{prefix}{line} ({meaning})" for line in lines]
    if changed:
        some = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
        remedy = f"set the old values to resume it, use another RUN= for the new ones, or delete {folder} to start over"
        if folder not in place.parents:
            remedy = "set another loop.resume_from"
        raise UserError(f"{place} is of a run with other settings, inputs or data, old -> new: {some}; {remedy}")


def _without_places(value: Any) -> Any:
    """A config without the paths of its data sources, which are elements of lists."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [{key: part for key, part in item.items() if key not in FREE_SOURCE_KEYS} for item in value]
    return value


def data_fingerprints(config: Any) -> dict[str, str]:
    """`source_fingerprint` of every data source of a recipe's config, by section and name."""
    lists = {f"data.{name}": getattr(config.data, name, []) for name in ("sources", "texts", "conversations")}
    if hasattr(config, "text_validation"):
        lists["text_validation.texts"] = config.text_validation.texts
    return {f"{section}.{source.name}": source_fingerprint(source) for section, all in lists.items() for source in all}


def start_folder(config: Any) -> None:
    """Write config.yaml of a run that `is_done` has accepted; a missing one is reported."""
    path = Path(config.loop.output_dir) / "config.yaml"
    if not path.exists() and (path.with_name("done.json").exists() or path.with_name("checkpoints").exists()):
        logger.warning("%s is missing; writing it again from this command, whose settings are those of the run", path)
    save_config(config, path)


def result_files(folder: Path) -> dict[str, str]:
    """A digest of every file of the finished model below `folder`, by path; empty for those that may be edited."""
    folders = [folder / name for name in RESULT_FOLDERS if (folder / name).is_dir()]
    return {str(path.relative_to(folder)): _file_digest(path) for part in folders for path in walk_files(part)}


def damaged_files(folder: Path, files: dict[str, str], *, digest: Callable[[Path], str] | None = None) -> list[str]:
    """The names in `files`, such as `result_files`, whose file is missing or no longer has its digest."""
    digest = digest or _file_digest
    return [name for name, value in files.items() if not (folder / name).is_file() or digest(folder / name) != value]


def _file_digest(path: Path) -> str:
    if path.name in EDITABLE:
        return ""
    if path.stat().st_size <= WHOLE_BYTES:
        return sha256_of(path)[:16]
    with path.open("rb") as file:
        return short_hash(path.stat().st_size, file.read(2**20))


def model_digest(path_or_hub_id: str, *, made_by: str) -> str:
    """Fingerprint of the weights of a model folder or of a file; a hub id is its own fingerprint.

    Without weights, the UserError names the make target `made_by`, which writes such a folder.
    """
    if digest := weights_digest(path_or_hub_id):
        return digest
    is_local = path_or_hub_id.startswith((".", "/", "runs/")) or Path(path_or_hub_id).exists()
    if is_local or not HUB_ID.fullmatch(path_or_hub_id):
        raise UserError(
            f"there is no model in '{path_or_hub_id}'; run `make {made_by}` first, or give a model folder or hub id"
        )
    return path_or_hub_id
