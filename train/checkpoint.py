"""Training checkpoints: float32 weights, trained buffers and optimizer state by name, in safetensors.

DeepSpeed partitions them over ranks, depending on the ZeRO stage. A save gathers them, one parameter at a time, and
writes them whole. So a checkpoint loads with any number of processes, ZeRO stage and precision, without pickle, and
restores the run bit for bit.

    step-00000500/
        model-00000.safetensors ...    # "NAME/param", "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/average", "NAME/buffer"
        meta.json                      # step, state, sha256 of every file and of itself

The folder is written as `step-00000500.partial`, synced, then renamed, so it appears complete or not at all. If a
file does not match its hash, it was damaged later.
"""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train.engine import AVERAGE, base_optimizer, state_keys
from train.run_folder import damaged_files, read_record, write_record
from um3.core.distributed import device, is_main, sum_over_ranks, wait_for_main
from um3.core.errors import UserError
from um3.core.files import atomic_folder, sha256_of

logger = logging.getLogger(__name__)

FILE_BYTES = 2 * 2**30
LEFTOVERS = ("*.partial", "*.old")
"""Remains of a save or deletion that was interrupted by a kill."""
Checkpoint = tuple[Path, dict[str, Any]]
"""The folder of a checkpoint, and its meta.json."""


def save_checkpoint(folder: Path, *, step: int, engines: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`, complete or not at all; return it (a collective call)."""
    target = _step_folder(folder, step)
    if is_main():
        with atomic_folder(target) as partial, ThreadPoolExecutor() as pool:
            # A file is hashed while the next one is gathered and written: hashing takes as long as a fast disk.
            names = (name for label, engine in engines.items() for name in _write_engine(partial, label, engine))
            hashes = {name: pool.submit(sha256_of, partial / name) for name in names}
            digests = {name: digest.result() for name, digest in hashes.items()}
            write_record(partial / "meta.json", {"step": step, "state": state, "files": digests})
    else:
        for engine in engines.values():
            for _ in _full_tensors(engine, kinds=("param", *state_keys(engine))):
                pass
    wait_for_main()
    return target


def resume_point(folder: Path) -> Checkpoint | None:
    """The result of `find_checkpoint` on the first rank, the same on every rank (a collective call)."""
    found = find_checkpoint(folder) if is_main() else None
    wait_for_main()  # while it reads the whole checkpoint
    step = sum_over_ranks(torch.tensor(0 if found is None else found[1]["step"], device=device()))
    path = _step_folder(folder, int(step))
    return found if step == 0 or is_main() else (path, read_meta(path))


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint; None if none was ever saved, UserError if all are damaged.

    Newer damaged checkpoints are reported and renamed to `step-NNNNNNNN.damaged`; the next save deletes them.
    """
    _delete(folder, *LEFTOVERS)
    damaged: dict[Path, str] = {}
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        meta, files = read_checkpoint(path)
        if not files:
            for newer in damaged:
                shutil.rmtree(newer.with_name(newer.name + ".damaged"), ignore_errors=True)
                os.replace(newer, newer.with_name(newer.name + ".damaged"))
            return path, meta
        damaged[path] = ", ".join(files)
        logger.warning("checkpoint %s is damaged (%s): trying the previous one", path, damaged[path])
    if damaged:
        details = "; ".join(f"{path.name}: {files}" for path, files in damaged.items())
        remedy = f"restore one from a backup, or delete {folder} to start from step 0"
        raise UserError(f"every checkpoint in {folder} is damaged ({details}); {remedy}")
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint: step, state, files."""
    return read_record(path / "meta.json")


def read_checkpoint(path: Path) -> tuple[dict[str, Any], list[str]]:
    """meta.json, and the names of the checkpoint's files that are missing or differ from what was written."""
    with contextlib.suppress(UserError):
        meta = read_meta(path)
        if path == _step_folder(path.parent, meta["step"]):
            return meta, damaged_files(path, meta["files"], digest=sha256_of)
    return {}, ["meta.json"]


def load_weights(path: Path, *, label: str, module: torch.nn.Module) -> None:
    """Copy a checkpoint's weights and trained buffers, which must be those of `module`, before its engine is built and
    copies masters."""
    missing, remedy = dict(_trainable(module)) | dict(_trained_buffers(module)), "resume with the run's config.yaml"
    for name, kind, tensor in _read_tensors(path, label):
        if kind not in ("param", "buffer"):
            continue
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            problem = "does not have" if parameter is None else f"has with shape {tuple(parameter.shape)}"
            stored = f"'{name}' of shape {tuple(tensor.shape)}"
            raise UserError(f"{path} holds {stored}, which this model {problem}; {remedy}")
        parameter.data.copy_(tensor)
    if missing:
        raise UserError(f"{path} lacks '{min(missing)}' and {len(missing) - 1} more parameters of this model; {remedy}")


def load_optimizer(path: Path, *, step: int, label: str, engine: Any) -> None:
    """Load float32 masters and optimizer state, of `step`, into a newly built engine."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    partitioned = engine.zero_optimization() or engine.bfloat16_enabled()
    parameters, kinds = dict(_trainable(engine.module)), ("param", *state_keys(engine))
    base = base_optimizer(engine)
    for state in base.state.values():
        state["step"].fill_(step)
    for name, kind, tensor in _read_tensors(path, label):
        if kind not in kinds:
            continue  # a moving average, which this run does not keep
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
    """Delete the remains of interrupted saves, and all checkpoints but the newest `keep` and the (newest) one with the
    lowest `state["means"][best_by]`."""
    if not is_main():
        return
    _delete(folder, *LEFTOVERS, "*.damaged")
    paths = sorted(folder.glob("step-*[0-9]"))
    scores = {path: score for path in reversed(paths) if (score := _mean(path, best_by)) is not None}
    kept = {*paths[-keep:], *([min(scores, key=scores.__getitem__)] if scores else [])}
    for path in paths:
        if path not in kept:
            # A kill during the deletion must not leave a damaged checkpoint.
            os.replace(path, path.with_name(path.name + ".old"))
    _delete(folder, "*.old")


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Float32 weights of the trainable parameters by name, or their moving average if the engine keeps one, on
    every rank (a collective call)."""
    kind = AVERAGE if AVERAGE in state_keys(engine) else "param"
    return {key.removesuffix(f"/{kind}"): tensor for key, tensor in _full_tensors(engine, kinds=(kind,))}


def each_weight(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of `full_weights` and of the frozen parameters, one at a time, also for a model that no
    process holds whole (a collective call: every rank must exhaust it)."""
    from deepspeed import zero

    kind = AVERAGE if AVERAGE in state_keys(engine) else "param"
    for key, tensor in _full_tensors(engine, kinds=(kind,)):
        yield key.removesuffix(f"/{kind}"), tensor
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with zero.GatheredParameters(parameter):
                tensor = parameter.detach().float().cpu()
            yield name, tensor


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _delete(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)


def _mean(path: Path, name: str) -> float | None:
    """The mean of a metric that a checkpoint holds; None if it does not, or is damaged."""
    with contextlib.suppress(UserError, KeyError):
        return float(read_meta(path)["state"]["means"][name])
    return None


def _trainable(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _trained_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that change in training, such as a codebook: those in a module's `trained_buffers`."""
    for prefix, part in module.named_modules():
        for name in getattr(part, "trained_buffers", ()):
            yield f"{prefix}.{name}", part.get_buffer(name)


def _full_tensors(engine: Any, *, kinds: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """("NAME/KIND", whole float32 tensor on the CPU) of weights and optimizer state (a collective call)."""
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


def _write_engine(folder: Path, label: str, engine: Any) -> Iterator[str]:
    """Write an engine's tensors; yield the name of every file once it is complete."""
    pending: dict[str, torch.Tensor] = {}
    names = (f"{label}-{number:05d}.safetensors" for number in itertools.count())

    def flush() -> str:
        name = next(names)
        save_file(pending, folder / name)
        pending.clear()
        return name

    buffers = ((f"{name}/buffer", tensor.float().cpu()) for name, tensor in _trained_buffers(engine.module))
    for key, tensor in itertools.chain(_full_tensors(engine, kinds=("param", *state_keys(engine))), buffers):
        pending[key] = tensor.clone()
        if sum(value.nbytes for value in pending.values()) > FILE_BYTES:
            yield flush()
    if pending:
        yield flush()


def _read_tensors(path: Path, label: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(parameter name, kind, tensor) of every tensor of an engine."""
    for file in sorted(path.glob(f"{label}-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield *key.rsplit("/", 1), tensors.get_tensor(key)
        except SafetensorError as error:
            remedy = f"delete {path} to resume from the previous checkpoint"
            raise UserError(f"{file} is damaged ({error}); {remedy}") from None
