"""Config sections that all recipes share. The recipes' own configs: `train/settings/`.

This module does not import torch: a phase that is up to date must end at once.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from um3.core.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range

PASSED_KEYS = {
    "zero_optimization": dict,
    "communication_data_type": str,
    "wall_clock_breakdown": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
}
"""DeepSpeed's keys that `engine.deepspeed` may hold: our settings decide the others, or they do nothing in our loop."""
OUR_KEYS = {
    "train_batch_size": "loop.batch_size",
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "loop.micro_batch_size"),
    "gradient_clipping": "optimizer.grad_clip",
    **dict.fromkeys(("optimizer", "zero_allow_untested_optimizer"), "optimizer.kind"),
    "scheduler": "optimizer.schedule",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types"), "engine.precision"),
    **dict.fromkeys(("zero_force_ds_cpu_optimizer", "zero_optimization.offload_optimizer"), "engine.offload_optimizer"),
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.reduce_bucket_size": "engine.bucket_elements",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "steps_per_print": "loop.log_every_steps",
    **dict.fromkeys(("tensorboard", "wandb"), "loop.loggers"),
}
"""DeepSpeed's keys that our settings decide."""


@dataclass
class OptimizerConfig:
    """An optimizer with its learning rate schedule (SPEC Tables 8 and 9)."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: PositiveFloat = 5e-4
    """Peak learning rate of every parameter that no entry of `module_lr` matches."""
    module_lr: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Peak learning rate by parameter-name prefix, such as {vision_model.: 2e-4}; the longest match wins."""
    betas: Annotated[list[Decay], Range(2, 2)] = field(default_factory=lambda: [0.9, 0.95])
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.05
    """Applied to weights of two or more dimensions only."""
    grad_clip: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 2000
    final_lr_ratio: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    ema_decay: Decay = 0.0
    """Decay per step of an exponential moving average of the weights, which the saved model then holds; 0: no
    average."""


@dataclass
class EngineConfig:
    """How DeepSpeed runs the model; the same options serve one CPU process and many nodes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-true"] = "auto"
    """bf16-true: weights in bf16 with float32 masters. bf16-mixed: float32 weights, bf16 matrix products (autocast).
    auto: bf16-mixed on a GPU and on a CPU with AMX for bf16, else fp32."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (AdamW under ZeRO 1-3, GPU only)."""
    activation_checkpointing: bool = False
    """Store only each layer's input and recompute the rest in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile (ZeRO 0-2); the first steps take minutes."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """UM3's attention. For packed sequences SDPA builds a mask; flash attention (GPU, flash-attn installed) does not,
    flex attention (GPU, compiled by the first steps) builds one of blocks. eager is plain matrix products: on a CPU it
    is faster for short sequences."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """Torch's fused AdamW, and on a GPU Liger's kernels in the language model if liger-kernel is installed."""
    bucket_elements: PositiveInt = 500_000_000
    """Gradient elements that ZeRO reduces at a time. It holds one or two buffers of this size, or of the model's size
    if that is smaller."""
    timeout_s: PositiveInt = 600
    """Seconds that a process waits for the others; then all stop, and one line names the one that did not answer."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration that no setting of ours decides (PASSED_KEYS), such as
    {zero_optimization: {overlap_comm: true}}."""

    def __post_init__(self) -> None:
        zero = self.deepspeed.get("zero_optimization")
        names = zero if isinstance(zero, dict) else ()
        for key in (*self.deepspeed, *(f"zero_optimization.{name}" for name in names)):
            if key in OUR_KEYS:
                raise ValueError(f"engine.deepspeed: '{key}' is decided by {OUR_KEYS[key]}; set that instead")
            if key in PASSED_KEYS and not isinstance(self.deepspeed[key], PASSED_KEYS[key]):
                raise ValueError(f"engine.deepspeed: '{key}' must be a {PASSED_KEYS[key].__name__}")
            if key.partition(".")[0] not in PASSED_KEYS:
                raise ValueError(f"engine.deepspeed: unknown key '{key}'; it takes {', '.join(PASSED_KEYS)}")


@dataclass
class LoopConfig:
    """Output folder, length, and how often the run logs and saves."""

    output_dir: str = ""
    """Folder of this phase, such as runs/demo/stage1."""
    seed: int = 0
    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 128
    """Samples per step over all ranks and accumulation steps."""
    micro_batch_size: NonNegativeInt = 0
    """Samples per forward pass and rank; 0: a rank's whole share at once."""
    log_every_steps: PositiveInt = 10
    save_every_steps: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep."""
    resume_from: str = ""
    """A checkpoint of another run, such as runs/a/um3/checkpoints/step-00000500, that a run without checkpoints resumes
    from with its own settings (a lower learning rate, for example)."""
    keep_best_by: str = "train/loss"
    """Metric whose lowest mean between two saves marks the best checkpoint, which is kept too; empty: keep none."""
    num_threads: NonNegativeInt = 0
    """CPU threads per process, at most its share of the cores; 0: torch's default."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Additional copies of metrics.jsonl: tensorboard, wandb."""

    def is_logged(self, step: int) -> bool:
        """Whether metrics.jsonl has a row for step number `step`, counted from 1."""
        return step % self.log_every_steps == 0 or step in (1, self.max_steps)


@dataclass
class PhaseConfig:
    """The sections that every phase has; a phase's own config adds the others and sets other defaults."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def check_intervals(loop: LoopConfig, **every_steps: int) -> None:
    """Raise ValueError if a measurement, by its section's name, would fall between two rows of metrics.jsonl."""
    for name, steps in every_steps.items():
        if steps % loop.log_every_steps:
            needed = f"must be a multiple of loop.log_every_steps={loop.log_every_steps}, or is not logged"
            raise ValueError(f"{name}.every_steps={steps} {needed}; change one of them, or set 0 to switch it off")
