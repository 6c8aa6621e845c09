"""The DeepSpeed engine: the same call on one CPU process and on many nodes.

The engine's dictionary is built from `EngineConfig` here and nowhere else.
"""

import importlib.util
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from train.config import EngineConfig, LoopConfig, OptimizerConfig
from train.optim import build_optimizer
from um3.core.distributed import device, prepare_environment, world_size
from um3.core.errors import UserError
from um3.core.log import setup_logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of every optimizer beside the step count (the second stays zero where Muon steps)."""
AVERAGE = "average"
"""Moving average of the weights, kept as optimizer state: so ZeRO divides it and checkpoints hold it."""
STOCK = ("llama", "qwen2", "qwen3")
"""Language models whose layers Liger replaces."""


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
    if torch.cuda.is_available():
        _take_gpu()
    else:
        # With several CPU processes DeepSpeed would compile a shared-memory collective with g++ (minutes);
        # gloo's collectives are what the CPU runs need, and no config option turns that build off. On a GPU the look
        # itself would do harm: it tries the build of every operator and prints what lacks for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    setup_logging()


def _take_gpu() -> None:
    """Make this process's GPU the current one: NCCL, torch's peak memory and DeepSpeed look there.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """
    place, count = device(), torch.cuda.device_count()
    if place.index >= count:
        raise UserError(f"process {place.index} has no GPU of its own, this machine has {count}; set NPROC={count}")
    torch.cuda.set_device(place)


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


def precision_of(engine: EngineConfig) -> Literal["fp32", "bf16-mixed", "bf16-true"]:
    """The precision that "auto" stands for on this machine, or the one that was asked for."""
    if engine.precision == "auto":
        return "bf16-mixed" if torch.cuda.is_available() else "fp32"
    return engine.precision


def check_engine(engine: EngineConfig, *, optimizer: OptimizerConfig) -> None:
    """Refuse what cannot run together.

    Raises:
        UserError: LAMB with ZeRO above 0 (a flat partition has no per-tensor norm); Muon with ZeRO 3; bf16 weights with
            ZeRO 0 or with LAMB or Muon; offloading without a GPU, at ZeRO 0 or with Muon; compiled layers with ZeRO 3.
    """
    stage, kind = engine.zero_stage, optimizer.kind
    if kind == "lamb" and stage > 0:
        raise UserError(
            f"LAMB scales each tensor by its own norm, which ZeRO {stage} cuts apart; set engine.zero_stage=0"
        )
    if kind == "muon" and stage == 3:
        raise UserError("Muon needs whole matrices, which ZeRO 3 cuts apart; set engine.zero_stage=2 or less")
    if kind != "adamw" and engine.precision == "bf16-true":
        raise UserError(f"{kind} needs float32 weights; set engine.precision=bf16-mixed for bf16 matrix products")
    if engine.precision == "bf16-true" and stage == 0:
        raise UserError("bf16 weights have their float32 masters in ZeRO; set engine.zero_stage=1 or more with them")
    if engine.compile and stage == 3:
        raise UserError(
            "ZeRO 3 fetches weights inside the layers; set engine.compile=false, or engine.zero_stage=2 or less"
        )
    if engine.offload_optimizer:
        if stage == 0 or kind != "adamw":
            raise UserError("engine.offload_optimizer is for AdamW under ZeRO 1 to 3; change one of them")
        if not torch.cuda.is_available():
            raise UserError("engine.offload_optimizer frees a GPU's memory, and there is no GPU here; leave it off")


def set_attention(model: "PreTrainedModel", engine: EngineConfig) -> None:
    """Have the language model's layers use the config's attention.

    Raises:
        UserError: it is not installed, or needs a GPU or bf16 products.
    """
    if "flash" in engine.attention and not (torch.cuda.is_available() and precision_of(engine) != "fp32"):
        raise UserError(f"engine.attention={engine.attention} needs a GPU and bf16 products; set engine.attention=sdpa")
    try:
        model.set_attn_implementation(engine.attention)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"engine.attention={engine.attention}: {reason}; install it, or set engine.attention=sdpa"
        ) from None


def compile_layers(model: nn.Module) -> None:
    """Have torch.compile compile every repeated layer, in place, when it is first called; names stay as they are.

    Layers alike share their code, so it is compiled once, and again for other lengths of rows: the second length makes
    them variable.
    """
    stacks = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    for layer in (layer for stack in stacks for layer in stack):
        layer.compile()


def fuse_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Have torch's AdamW update all in one kernel, with no temporaries."""
    for group in optimizer.param_groups:
        group["fused"] = True


def fuse_layers(model: nn.Module) -> list[str]:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into the stock language models, where liger-kernel is installed;
    returns what was put in."""
    from transformers import PreTrainedModel

    stock = [each for each in model.modules() if isinstance(each, PreTrainedModel) and each.config.model_type in STOCK]
    if not stock or importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # The first is the outermost, whose parts the others are.
    _apply_liger_kernel_to_instance(stock[0], cross_entropy=False, fused_linear_cross_entropy=False)
    return ["RMSNorm, SwiGLU, rotary embedding (Liger)"]


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
        UserError: what `check_engine` refuses.
    """
    import deepspeed

    check_engine(engine, optimizer=optimizer)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size(),
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": min(engine.bucket_elements, trained),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if precision_of(engine) == "bf16-true":
        options["bf16"] = {"enabled": True}
    if precision_of(engine) == "bf16-mixed":
        # On a GPU DeepSpeed switches off an autocast around its engine that is not in its own options. Of the modules
        # named safe it would reduce the gradients in bf16: none is.
        options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if engine.offload_optimizer:
        options["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        options["zero_force_ds_cpu_optimizer"] = False
    stepper = build_optimizer(model.named_parameters(), config=optimizer)
    if engine.fused_kernels == "auto" and torch.cuda.is_available():
        used = fuse_layers(model)
        if optimizer.kind == "adamw":
            fuse_adamw(stepper)
            used.append("AdamW (torch)")
        logger.info("fused kernels: %s", ", ".join(used) or "none")
    if engine.compile:
        compile_layers(model)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=stepper, config=options)
    _create_optimizer_state(wrapped)
    return wrapped


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def state_keys(engine: Any) -> tuple[str, ...]:
    """Names of the optimizer state that each parameter has."""
    return (*MOMENTS, AVERAGE) if _average_decay(engine) else MOMENTS


def _average_decay(engine: Any) -> float:
    return float(base_optimizer(engine).param_groups[0]["ema_decay"])


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
        # A fused step counts on the device.
        step = torch.zeros((), device=parameter.device if base.param_groups[0].get("fused") else "cpu")
        base.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in MOMENTS}
        if _average_decay(engine):
            base.state[parameter][AVERAGE] = parameter.detach().clone()
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._lazy_init_hp_params_optimizer_state()


def autocast(engine: EngineConfig) -> torch.autocast:
    """The autocast context of the config: bf16 matrix products, or nothing."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision_of(engine) == "bf16-mixed")


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
