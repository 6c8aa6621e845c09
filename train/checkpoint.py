"""Training checkpoints: float32 weights and optimizer state by parameter name, in safetensors.

DeepSpeed partitions them over ranks as its ZeRO stage says; here they are gathered, one parameter at a time,
and written whole. So a checkpoint fits any number of processes, any ZeRO stage and any precision, is read
without pickle, and restores the run bit for bit.

    step-00000500/
        model-00000.safetensors ...    # "NAME/param", "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/average"
        meta.json                      # written last: no meta.json, no checkpoint
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train.engine import AVERAGE, base_optimizer, state_keys
from um3.core.distributed import barrier, is_main
from um3.core.errors import UserError
from um3.core.files import atomic_folder, read_json, sha256_of, write_json

logger = logging.getLogger(__name__)

FILE_BYTES = 2 * 2**30


def save_checkpoint(folder: Path, *, step: int, engines: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`; every rank must call it. The step folder appears whole or not at all."""
    target = folder / f"step-{step:08d}"
    if is_main():
        with atomic_folder(target) as partial:
            names = [name for label, engine in engines.items() for name in _write_engine(partial, label, engine)]
            digests = {name: sha256_of(partial / name) for name in names}
            write_json(partial / "meta.json", {"step": step, "state": state, "files": digests})
    else:
        for engine in engines.values():
            for _ in _full_tensors(engine, kinds=("param", *state_keys(engine))):
                pass
    barrier()
    return target


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; a damaged one is named and passed over."""
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        if not (path / "meta.json").exists():
            continue
        try:
            meta = read_json(path / "meta.json")
            damaged = [name for name, digest in meta["files"].items() if sha256_of(path / name) != digest]
        except (OSError, KeyError, UserError):
            damaged = ["meta.json"]
        if not damaged:
            return path
        logger.warning("checkpoint %s is damaged (%s): using the one before it", path, ", ".join(damaged))
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
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(
                f"{path} holds '{name}' {tuple(tensor.shape)}, which this model has not; use the run's own config"
            )
        parameters[name].data.copy_(tensor)
        seen.add(name)
    missing = parameters.keys() - seen
    if missing:
        raise UserError(f"{path} lacks '{min(missing)}' and {len(missing) - 1} more; use the run's own config")


def load_optimizer(path: Path, *, label: str, engine: Any) -> None:
    """Restore float32 masters and optimizer state into a freshly built engine."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    step = read_meta(path)["step"]
    partitioned = engine.zero_optimization() or engine.bfloat16_enabled()
    parameters = dict(_trainable(engine.module))
    base = base_optimizer(engine)
    for state in base.state.values():
        state["step"].fill_(step)
    for key, tensor in _read_tensors(path, label):
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        tensor = tensor.to(parameter.device)
        if partitioned and kind == "param":
            safe_set_full_fp32_param(parameter, tensor)
        elif partitioned:
            safe_set_full_optimizer_state(parameter, tensor, kind)
        elif kind != "param":
            base.state[parameter][kind].copy_(tensor)
    engine.global_steps = step


def remove_old(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted saves left behind."""
    if not is_main():
        return
    for path in sorted(folder.glob("step-*[0-9]"))[:-keep]:
        shutil.rmtree(path)
    for leftover in [*folder.glob("*.partial"), *folder.glob("*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Float32 weights of the trainable parameters by name, or their average where the engine keeps one, gathered on
    every rank (a collective call)."""
    kind = AVERAGE if AVERAGE in state_keys(engine) else "param"
    return {key.removesuffix(f"/{kind}"): tensor for key, tensor in _full_tensors(engine, kinds=(kind,))}


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
