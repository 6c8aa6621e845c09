"""Training checkpoints: float32 weights and optimizer state by parameter name, in safetensors.

DeepSpeed partitions them over ranks as its ZeRO stage says; here they are gathered, one parameter at a time,
and written whole. So a checkpoint fits any number of processes, any ZeRO stage and any precision, is read
without pickle, and restores the run bit for bit.

    step-00000500/
        model-00000.safetensors ...    # "NAME/param", "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/average"
        meta.json                      # step, state, sha256 of every file and of itself

The folder is written as `step-00000500.partial`, synced, then renamed: it appears whole or not at all. One that is not
whole any more was damaged afterwards.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train.engine import AVERAGE, base_optimizer, state_keys
from um3.core.distributed import barrier, device, is_main, sum_over_ranks
from um3.core.errors import UserError
from um3.core.files import atomic_folder, read_json, sha256_of, write_json

logger = logging.getLogger(__name__)

FILE_BYTES = 2 * 2**30
LEFTOVERS = ("*.partial", "*.old")
"""What a kill in the middle of a save or of a deletion leaves."""


def save_checkpoint(folder: Path, *, step: int, engines: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`; every rank must call it. The step folder appears whole or not at all."""
    target = _step_folder(folder, step)
    if is_main():
        with atomic_folder(target) as partial:
            names = [name for label, engine in engines.items() for name in _write_engine(partial, label, engine)]
            digests = {name: sha256_of(partial / name) for name in names}
            meta = {"step": step, "state": state, "files": digests}
            write_json(partial / "meta.json", meta | {"sha256": _digest(meta)})
    else:
        for engine in engines.values():
            for _ in _full_tensors(engine, kinds=("param", *state_keys(engine))):
                pass
    barrier()
    return target


def resume_point(folder: Path) -> Path | None:
    """What `find_checkpoint` finds, read by the first rank alone and so the same on all (a collective call)."""
    found = find_checkpoint(folder) if is_main() else None
    step = sum_over_ranks(torch.tensor(0 if found is None else read_meta(found)["step"], device=device()))
    return _step_folder(folder, int(step)) if step > 0 else None


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where none was ever saved.

    Damaged ones above it are named and set aside as `step-NNNNNNNN.damaged`, which the next save deletes.

    Raises:
        UserError: there are checkpoints, but not one is whole.
    """
    _sweep(folder, *LEFTOVERS)
    damaged: dict[Path, str] = {}
    for path in reversed(_step_folders(folder)):
        files = _damaged_files(path)
        if not files:
            for bad in damaged:
                shutil.rmtree(bad.with_name(bad.name + ".damaged"), ignore_errors=True)
                os.replace(bad, bad.with_name(bad.name + ".damaged"))
            return path
        damaged[path] = ", ".join(files)
        logger.warning("checkpoint %s is damaged (%s): trying the one before it", path, damaged[path])
    if damaged:
        found = "; ".join(f"{path.name}: {files}" for path, files in damaged.items())
        raise UserError(
            f"no checkpoint in {folder} is whole ({found}); bring one of them back from a copy, or delete {folder} "
            "to train anew"
        )
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """The step and state of a checkpoint."""
    return read_json(path / "meta.json")


def load_weights(path: Path, *, label: str, module: torch.nn.Module) -> None:
    """Copy a checkpoint's weights into a module, before the engine is built: it takes its masters from there.

    Raises:
        UserError: the checkpoint holds other parameters than the module.
    """
    parameters = dict(_trainable(module))
    seen = set()
    for key, tensor in _read_tensors(path, label):
        name, kind = key.rsplit("/", 1)
        if kind != "param":
            continue
        ours = parameters.get(name)
        if ours is None or ours.shape != tensor.shape:
            here = "lacks it" if ours is None else f"has {tuple(ours.shape)}"
            raise UserError(
                f"{path} holds '{name}' {tuple(tensor.shape)}, this model {here}: another vocabulary or size; "
                "use the run's own config"
            )
        ours.data.copy_(tensor)
        seen.add(name)
    missing = parameters.keys() - seen
    if missing:
        raise UserError(f"{path} lacks '{min(missing)}' and {len(missing) - 1} more; use the run's own config")


def load_optimizer(path: Path, *, label: str, engine: Any) -> None:
    """Restore float32 masters and optimizer state into a freshly built engine."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    step = read_meta(path)["step"]
    partitioned = engine.zero_optimization() or engine.bfloat16_enabled()
    parameters, kinds = dict(_trainable(engine.module)), ("param", *state_keys(engine))
    base = base_optimizer(engine)
    for state in base.state.values():
        state["step"].fill_(step)
    for key, tensor in _read_tensors(path, label):
        name, kind = key.rsplit("/", 1)
        if kind not in kinds:
            continue  # an average that this run does not keep
        parameter = parameters[name]
        tensor = tensor.to(parameter.device)
        if partitioned and kind == "param":
            safe_set_full_fp32_param(parameter, tensor)
        elif partitioned:
            safe_set_full_optimizer_state(parameter, tensor, kind)
        elif kind != "param":
            base.state[parameter][kind].copy_(tensor)
    engine.global_steps = step


def remove_old(folder: Path, *, keep: int, best_by: str = "") -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what interrupted saves left behind.

    The best has the lowest `state["means"][best_by]`; the newest of equals.
    """
    if not is_main():
        return
    _sweep(folder, *LEFTOVERS, "*.damaged")
    paths = _step_folders(folder)
    scores = {path: score for path in reversed(paths) if (score := _mean(path, best_by)) is not None}
    spared = {*paths[-keep:], *([min(scores, key=scores.__getitem__)] if scores else [])}
    for path in paths:
        if path not in spared:
            os.replace(path, path.with_name(path.name + ".old"))  # gone at once: a kill leaves no half of it
    _sweep(folder, "*.old")


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Float32 weights of the trainable parameters by name, or their average where the engine keeps one, gathered on
    every rank (a collective call)."""
    kind = AVERAGE if AVERAGE in state_keys(engine) else "param"
    return {key.removesuffix(f"/{kind}"): tensor for key, tensor in _full_tensors(engine, kinds=(kind,))}


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _step_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*[0-9]"))


def _sweep(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)


def _damaged_files(path: Path) -> list[str]:
    """Names of the checkpoint's files that are gone or are not what was written."""
    try:
        meta = read_meta(path)
        files, own = meta["files"], meta.pop("sha256", None)
        if own not in (None, _digest(meta)) or path != _step_folder(path.parent, meta["step"]):
            return ["meta.json"]
        return [name for name, digest in files.items() if not _is_file_with(path / name, digest)]
    except (OSError, LookupError, TypeError, ValueError, AttributeError, UserError):
        return ["meta.json"]


def _is_file_with(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _mean(path: Path, name: str) -> float | None:
    try:
        return float(read_meta(path)["state"]["means"][name])
    except (OSError, LookupError, TypeError, ValueError, UserError):
        return None  # of a run that did not keep it


def _trainable(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _full_tensors(engine: Any, *, kinds: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, whole float32 tensor on the CPU) of weights and optimizer state; a collective over ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    partitioned = engine.zero_optimization() or engine.bfloat16_enabled()
    base = base_optimizer(engine)
    for name, parameter in _trainable(engine.module):
        for kind in kinds:
            if partitioned and kind == "param":
                tensor = safe_get_full_fp32_param(parameter)
            elif partitioned:
                tensor = safe_get_full_optimizer_state(parameter, kind)
            else:
                tensor = parameter if kind == "param" else base.state[parameter][kind]
            yield f"{name}/{kind}", tensor.detach().float().cpu().contiguous()


def _write_engine(folder: Path, label: str, engine: Any) -> list[str]:
    names: list[str] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if held:
            names.append(f"{label}-{len(names):05d}.safetensors")
            save_file(held, folder / names[-1])
            held.clear()

    for key, tensor in _full_tensors(engine, kinds=("param", *state_keys(engine))):
        held[key] = tensor.clone()
        if sum(value.nbytes for value in held.values()) > FILE_BYTES:
            flush()
    flush()
    return names


def _read_tensors(path: Path, label: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(path.glob(f"{label}-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise UserError(
                f"{file} is damaged ({error}); delete {path} to resume from the checkpoint before it"
            ) from None
