"""The folder of a training phase: whether its result is up to date, and what it was made from.

    config.yaml     the resolved config, written before the first step
    done.json       written last: inputs, fingerprints, time, memory, versions

This module does not import torch: a phase that is up to date must end at once.
"""

from pathlib import Path
from typing import Any

from um3.core.config import differences, load_config, save_config, to_dict
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.hub import HUB_ID, weights_digest

# Settings that a resumed run may change without becoming another run: they change no result.
FREE_SETTINGS = (
    "loop.log_every_steps",
    "loop.save_every_steps",
    "loop.keep_",
    "loop.num_threads",
    "loop.loggers",
    "loop.micro_batch_size",
    "engine.",
    "text_validation.alarm_above",
    "evaluate.",
)
# Folders may move: their content is compared by fingerprint.
FREE_FOLDERS = ("loop.output_dir", "model.init_from:", "init_from:", "visual_tokenizer:", "data.codes:")


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that make `new` another run than `old`, as `key: old -> new` lines."""
    return [line for line in differences(old, new) if not line.startswith((*FREE_SETTINGS, *FREE_FOLDERS))]


def is_done(config: Any, *, inputs: dict[str, str]) -> bool:
    """True if the phase's folder holds the finished result of this config and these inputs.

    Args:
        config: the recipe's config, with a `loop` section.
        inputs: fingerprints of the models that the phase starts from.

    Raises:
        UserError: the folder belongs to a run with other settings or other inputs.
    """
    folder = Path(config.loop.output_dir)
    if (folder / "config.yaml").exists():
        old = to_dict(load_config(type(config), path=folder / "config.yaml"))
        if changed := changed_settings(old, to_dict(config)):
            some = "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")
            raise UserError(
                f"{folder} was made with other settings ({some}); use another RUN=, or delete that folder to "
                "train again"
            )
    if not (folder / "done.json").exists():
        return False
    old_inputs = read_json(folder / "done.json")["inputs"]
    if old_inputs != inputs:
        raise UserError(
            f"{folder} was made from other inputs ({old_inputs} -> {inputs}); use another RUN=, or delete that folder "
            "to train again"
        )
    return True


def start_folder(config: Any) -> None:
    """Create the phase's folder with its resolved config.yaml."""
    folder = Path(config.loop.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_main() and not (folder / "config.yaml").exists():
        save_config(config, folder / "config.yaml")


def model_digest(path_or_hub_id: str, *, made_by: str) -> str:
    """Fingerprint of a model folder (a hash of its weights); a hub id is its own fingerprint.

    Args:
        made_by: the make target that writes such a folder, for the error message.

    Raises:
        UserError: the folder does not exist.
    """
    if digest := weights_digest(path_or_hub_id):
        return digest
    is_local = path_or_hub_id.startswith((".", "/", "runs/")) or Path(path_or_hub_id).exists()
    if is_local or not HUB_ID.fullmatch(path_or_hub_id):
        raise UserError(
            f"there is no model in '{path_or_hub_id}'; run `make {made_by}` first, or give a model folder or hub id"
        )
    return path_or_hub_id
