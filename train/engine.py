"""The DeepSpeed engine: the same call on one CPU process and on many nodes.

This is the only place that builds DeepSpeed's configuration dictionary, from `EngineConfig` and what its `deepspeed`
passes on.
"""

import importlib.util
import logging
import os
import re
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import distributed_c10d

from train.config import EngineConfig, LoopConfig, OptimizerConfig
from train.optim import build_optimizer
from um3.core.distributed import (
    device,
    mixed_precision,
    prepare_environment,
    resolve_precision,
    set_up_cpu,
    take_gpu,
    world_size,
)
from um3.core.errors import UserError
from um3.core.log import setup_logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of every optimizer besides the step count (Muon leaves the second at zero)."""
AVERAGE = "average"
"""Moving average of the weights. It is optimizer state, so that ZeRO partitions it and checkpoints hold it."""
STOCK = ("llama", "qwen2", "qwen3")
"""Model types whose layers Liger can replace."""


def start_runtime(loop: LoopConfig, *, timeout_s: float = EngineConfig.timeout_s) -> None:
    """Set threads, start the process group and silence DeepSpeed's messages. Call once, before any model is built.

    Collectives of all groups, also of those that DeepSpeed creates, fail after `timeout_s`.
    """
    set_up_cpu(loop.num_threads)
    prepare_environment()
    setup_logging()
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    # By default DeepSpeed prints every engine setting on stdout.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch has deprecated; a user cannot change that.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    if torch.cuda.is_available():
        take_gpu()
    else:
        # With several CPU processes DeepSpeed compiles a shared-memory collective with g++, which takes minutes and has
        # no option to switch it off; gloo's collectives are sufficient. On a GPU, reading this table would probe the
        # build of every operator and print the missing requirements.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    setup_logging()


def split_batch(loop: LoopConfig) -> tuple[int, int]:
    """(micro-batch size per rank, accumulation steps) of the global batch; UserError if they do not divide it."""
    ranks = world_size()
    if loop.batch_size % ranks:
        raise UserError(f"loop.batch_size={loop.batch_size} is not divisible by {ranks} processes; change one of them")
    per_rank = loop.batch_size // ranks
    micro = loop.micro_batch_size or per_rank
    if per_rank % micro:
        raise UserError(
            f"loop.micro_batch_size={micro} does not divide the {per_rank} samples of each process; set a divisor of it"
        )
    return micro, per_rank // micro


def precision_of(engine: EngineConfig, *, on: torch.device | None = None) -> str:
    """The configured precision, with "auto" resolved for a device (this process's): fp32, bf16-mixed or bf16-true."""
    return resolve_precision(engine.precision, on=on)


def check_engine(engine: EngineConfig, *, optimizer: OptimizerConfig) -> None:
    """UserError for a combination of options that cannot work."""
    stage, kind, pure_bf16 = engine.zero_stage, optimizer.kind, engine.precision == "bf16-true"
    offload, no_gpu = engine.offload_optimizer, not torch.cuda.is_available()
    refused: list[tuple[bool, str]] = [
        (kind == "lamb" and stage > 0, f"LAMB needs the norms of whole tensors; set engine.zero_stage=0, not {stage}"),
        (kind == "muon" and stage == 3, "Muon needs whole matrices, which ZeRO 3 partitions; set engine.zero_stage=2"),
        (kind != "adamw" and pure_bf16, f"{kind} needs float32 weights; set engine.precision=bf16-mixed"),
        (pure_bf16 and stage == 0, "ZeRO holds the masters of bf16 weights; set engine.zero_stage=1, 2 or 3"),
        (engine.compile and stage == 3, "torch.compile cannot compile ZeRO 3's layers; set engine.compile=false"),
        (offload and stage == 0, "engine.offload_optimizer needs ZeRO; set engine.zero_stage=1, 2 or 3"),
        (offload and kind != "adamw", "engine.offload_optimizer needs AdamW; set optimizer.kind=adamw"),
        (offload and no_gpu, "engine.offload_optimizer needs a GPU; set engine.offload_optimizer=false"),
        (
            "zero_optimization" in engine.deepspeed and stage == 0,
            "engine.deepspeed: zero_optimization needs ZeRO; set engine.zero_stage=1, 2 or 3",
        ),
    ]
    for applies, message in refused:
        if applies:
            raise UserError(message)


def set_attention(model: "PreTrainedModel", engine: EngineConfig) -> None:
    """Make the language model use the configured attention; UserError if this machine or precision cannot."""
    if engine.attention not in ("sdpa", "eager") and not (torch.cuda.is_available() and precision_of(engine) != "fp32"):
        raise UserError(f"engine.attention={engine.attention} needs a GPU and bf16; set engine.attention=sdpa")
    try:
        model.set_attn_implementation(engine.attention)
    except ImportError as error:
        reason = f"engine.attention={engine.attention}: {' '.join(str(error).split())}"
        raise UserError(f"{reason}; install it, or set engine.attention=sdpa") from None


def compile_layers(model: nn.Module) -> None:
    """Compile every repeated layer with torch.compile, in place, on its first call; parameter names do not change.

    Equal layers share one compilation. It is repeated once for a second sequence length, and then serves all lengths.
    """
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile()


def fuse_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Make torch's AdamW, also Muon's, update all parameters in one kernel without temporary tensors."""
    for group in optimizer.param_groups:
        group["fused"] = "shapes" not in group


def fuse_layers(model: nn.Module) -> list[str]:
    """Use Liger's kernels, if installed, in stock language models; return the names of what they replace."""
    from transformers import PreTrainedModel

    stock = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config.model_type in STOCK]
    if not stock or importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # The first is the outermost module; the others are parts of it.
    _apply_liger_kernel_to_instance(stock[0], cross_entropy=False, fused_linear_cross_entropy=False)
    return ["RMSNorm, SwiGLU, rotary embedding (Liger)"]


def build_engine(model: nn.Module, *, optimizer: OptimizerConfig, engine: EngineConfig, loop: LoopConfig) -> Any:
    """Wrap `model` and its optimizer in a DeepSpeed engine; UserError from `check_engine` or `split_batch`."""
    import deepspeed

    check_engine(engine, optimizer=optimizer)
    micro_batch_size, accumulation_steps = split_batch(loop)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options = engine.deepspeed | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": loop.batch_size,
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": {
            **engine.deepspeed.get("zero_optimization", {}),
            "stage": engine.zero_stage,
            "reduce_bucket_size": min(engine.bucket_elements, num_trained),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if precision_of(engine) == "bf16-true":
        options["bf16"] = {"enabled": True}
    if precision_of(engine) == "bf16-mixed":
        # On a GPU DeepSpeed switches autocast off inside its engine unless its own options ask for it. It would reduce
        # the gradients of the "safe" modules in bf16, so the list is empty.
        options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if engine.offload_optimizer:
        options["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        options["zero_force_ds_cpu_optimizer"] = False
    torch_optimizer = build_optimizer(model.named_parameters(), config=optimizer)
    if engine.fused_kernels == "auto":
        fused = fuse_layers(model) if torch.cuda.is_available() else []
        if optimizer.kind != "lamb":
            fuse_adamw(torch_optimizer)
            fused.append("AdamW (torch)")
        logger.info("fused kernels: %s", ", ".join(fused) or "none")
    if engine.compile:
        compile_layers(model)
    try:
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=torch_optimizer, config=options)
    except (ValueError, AssertionError) as error:
        if not engine.deepspeed:
            raise
        reason = " ".join(re.sub(r" \[\w+=.*", "", str(error), flags=re.DOTALL).split())
        raise UserError(f"DeepSpeed refuses engine.deepspeed: {reason}; change or remove that key") from None
    if world_size() == 1 and not engine.zero_stage:
        # DeepSpeed would copy all gradients into buckets and back, a fifth of a step of SmolLM2-135M on a CPU.
        wrapped.enable_backward_allreduce = False
    _create_optimizer_state(wrapped)
    return wrapped


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def state_keys(engine: Any) -> tuple[str, ...]:
    """Names of the optimizer state tensors that every parameter has."""
    return (*MOMENTS, AVERAGE) if _average_decay(engine) else MOMENTS


def _average_decay(engine: Any) -> float:
    return float(base_optimizer(engine).param_groups[0]["ema_decay"])


def _create_optimizer_state(engine: Any) -> None:
    """Create the (zero) state that the optimizer would create in its first step, and the average of the weights.

    Checkpoints are loaded into it. ZeRO 1 and 2 also need it: they link parameters to their state once, after the first
    group's first step, when later groups would not have any.
    """
    base, wrapper = base_optimizer(engine), engine.optimizer
    if engine.zero_optimization_stage() == 3:
        partitions = list(wrapper.fp32_partitioned_groups_flat)
    else:
        partitions = [parameter for group in base.param_groups for parameter in group["params"]]
    is_fused = any(group.get("fused") for group in base.param_groups)
    for parameter in partitions:
        # The fused optimizer keeps its step count on the device.
        step = torch.zeros((), device=parameter.device if is_fused else "cpu")
        base.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in MOMENTS}
        if _average_decay(engine):
            base.state[parameter][AVERAGE] = parameter.detach().clone()
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._lazy_init_hp_params_optimizer_state()


def autocast(engine: EngineConfig) -> torch.autocast:
    """The autocast context of the configured precision."""
    return mixed_precision(engine.precision)


def step_engine(engine: Any) -> float:
    """Take the optimizer step (once the accumulation is complete) and return the global gradient norm before clipping.

    ZeRO computes the norm; without ZeRO, DeepSpeed clips but does not report it.
    """
    complete = engine.is_gradient_accumulation_boundary()
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        zero_norm = engine.get_global_grad_norm()
        norm = float("nan") if zero_norm is None else float(zero_norm)
    else:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
    if complete and (decay := _average_decay(engine)):
        for parameter, state in base_optimizer(engine).state.items():
            state[AVERAGE].lerp_(parameter.detach(), 1 - decay)
    return norm


def limit_parameter(engine: Any, parameter: nn.Parameter, *, maximum: float) -> None:
    """Clamp a trained parameter, and the float32 master that ZeRO and bf16 keep of it (a collective call)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    with torch.no_grad():
        if parameter.requires_grad and (engine.zero_optimization() or engine.bfloat16_enabled()):
            # The next step copies the master.
            safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(max=maximum))
        parameter.clamp_(max=maximum)
