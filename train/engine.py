"""The DeepSpeed engine: the same call on one CPU process and on many nodes.

The engine's dictionary is built from `EngineConfig` here and nowhere else.
"""

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from train.config import EngineConfig, LoopConfig, OptimizerConfig
from train.optim import build_optimizer
from um3.core.distributed import prepare_environment, world_size
from um3.core.errors import UserError
from um3.core.log import setup_logging

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of every optimizer beside the step count (the second stays zero where Muon steps)."""
AVERAGE = "average"
"""Moving average of the weights, kept as optimizer state: so ZeRO divides it and checkpoints hold it."""


def start_runtime(loop: LoopConfig) -> None:
    """Set threads, start the process group and quiet DeepSpeed. Call once, before any model is built."""
    if loop.num_threads:
        torch.set_num_threads(loop.num_threads)
    prepare_environment()
    setup_logging()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # Left alone, DeepSpeed's own logger tells every engine setting on stdout.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed's collectives go by names that torch has begun to rename; nothing a user could do about it.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # With several CPU processes DeepSpeed would compile a shared-memory collective with g++ (minutes);
    # gloo's collectives are what the CPU runs need, and no config option turns that build off.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    setup_logging()


def split_batch(loop: LoopConfig) -> tuple[int, int]:
    """(micro batch per rank, accumulation steps) that make up the global batch.

    Raises:
        UserError: the batch does not divide.
    """
    ranks = world_size()
    if loop.batch_size % ranks:
        raise UserError(f"batch_size {loop.batch_size} does not divide over {ranks} processes; change one of them")
    per_rank = loop.batch_size // ranks
    micro = loop.micro_batch_size or per_rank
    if per_rank % micro:
        raise UserError(f"micro_batch_size {micro} does not divide the {per_rank} samples of a process")
    return micro, per_rank // micro


def build_engine(
    model: nn.Module,
    *,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    micro_batch_size: int,
    accumulation_steps: int = 1,
) -> Any:
    """Wrap `model` and its optimizer in a DeepSpeed engine.

    Raises:
        UserError: LAMB with ZeRO above 0 (a flat partition has no per-tensor norm), Muon with ZeRO 3, bf16 with ZeRO 0.
    """
    import deepspeed

    if optimizer.kind == "lamb" and engine.zero_stage > 0:
        raise UserError(
            f"LAMB scales each tensor by its own norm, which ZeRO {engine.zero_stage} cuts apart; "
            "set engine.zero_stage=0"
        )
    if optimizer.kind == "muon" and engine.zero_stage == 3:
        raise UserError("Muon needs whole matrices, which ZeRO 3 cuts apart; set engine.zero_stage=2 or less")
    if optimizer.kind != "adamw" and engine.precision == "bf16":
        raise UserError(
            f"{optimizer.kind} needs float32 weights; set engine.precision=autocast for bf16 matrix products"
        )
    if engine.precision == "bf16" and engine.zero_stage == 0:
        raise UserError("bf16 weights have their float32 masters in ZeRO; set engine.zero_stage=1 or more with them")
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size(),
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if engine.precision == "bf16":
        options["bf16"] = {"enabled": True}
    if engine.offload_optimizer:
        options["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        options["zero_force_ds_cpu_optimizer"] = False
    wrapped, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model.named_parameters(), config=optimizer), config=options
    )
    _create_optimizer_state(wrapped)
    return wrapped


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def state_keys(engine: Any) -> tuple[str, ...]:
    """Names of the optimizer state that each parameter has."""
    return (*MOMENTS, AVERAGE) if _average_decay(engine) else MOMENTS


def _average_decay(engine: Any) -> float:
    return float(base_optimizer(engine).param_groups[0]["average_decay"])


def _create_optimizer_state(engine: Any) -> None:
    """Create the (zero) state that the optimizer would create in its first step, and the average of the weights.

    A checkpoint is loaded into it; and ZeRO 1 and 2 link parameters to their state after the first group's
    first step, when the groups after it would have none yet, and never again.
    """
    base, wrapper = base_optimizer(engine), engine.optimizer
    if engine.zero_optimization_stage() == 3:
        partitions = list(wrapper.fp32_partitioned_groups_flat)
    else:
        partitions = [parameter for group in base.param_groups for parameter in group["params"]]
    for parameter in partitions:
        base.state[parameter] = {"step": torch.zeros(())} | {key: torch.zeros_like(parameter) for key in MOMENTS}
        if _average_decay(engine):
            base.state[parameter][AVERAGE] = parameter.detach().clone()
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._lazy_init_hp_params_optimizer_state()


def autocast(engine: EngineConfig) -> torch.autocast:
    """The autocast context of the config: bf16 matrix products, or nothing."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=engine.precision == "autocast")


def step_engine(engine: Any) -> float:
    """Take the optimizer step (if the accumulation is complete) and return the global gradient norm before clipping.

    ZeRO computes the norm itself; without it DeepSpeed clips but does not tell the norm.
    """
    complete = engine.is_gradient_accumulation_boundary()
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        found = engine.get_global_grad_norm()
        norm = float(found) if found is not None else float("nan")
    else:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
    if complete and (decay := _average_decay(engine)):
        for parameter, state in base_optimizer(engine).state.items():
            state[AVERAGE].lerp_(parameter.detach(), 1 - decay)
    return norm
