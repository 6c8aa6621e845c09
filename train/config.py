"""Config sections that all recipes share. The recipes' own configs: `train/recipes/configs.py`.

This module does not import torch: a phase that is up to date must end at once.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class OptimizerConfig:
    """An optimizer with its learning rate schedule (SPEC Tables 8 and 9)."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = 5e-4
    """Peak learning rate of every parameter that no entry of `module_lr` matches."""
    module_lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate by parameter-name prefix, such as {vision_model.: 2e-4}; the longest match wins."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Applied to weights of two or more dimensions only."""
    grad_clip: float = 1.0
    """Maximum global gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 2000
    final_lr_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which the saved model then holds; 0: no
    average."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be two numbers in [0, 1)")
        if self.lr <= 0 or self.warmup_steps < 0 or self.grad_clip < 0:
            raise ValueError("lr must be positive, warmup_steps and grad_clip must not be negative")


@dataclass
class EngineConfig:
    """How DeepSpeed runs the model; the same options serve one CPU process and many nodes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-true"] = "auto"
    """bf16-true: weights in bf16 with float32 masters. bf16-mixed: float32 weights, bf16 matrix products (autocast).
    auto: bf16-mixed on a GPU, fp32 on a CPU."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (AdamW under ZeRO 1-3, GPU only)."""
    activation_checkpointing: bool = False
    """Store only each layer's input and recompute the rest in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile (ZeRO 0-2); the first steps take minutes."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """UM3's attention. For packed sequences SDPA builds a mask; flash attention (GPU, flash-attn installed) does
    not."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """On a GPU: torch's fused AdamW, and Liger's kernels in the language model if liger-kernel is installed."""
    bucket_elements: int = 500_000_000
    """Gradient elements that ZeRO reduces at a time. It holds one or two buffers of this size, or of the model's size
    if that is smaller."""

    def __post_init__(self) -> None:
        if self.bucket_elements < 1:
            raise ValueError(f"bucket_elements is {self.bucket_elements}; it must be at least 1")


@dataclass
class LoopConfig:
    """Output folder, length, and how often the run logs and saves."""

    output_dir: str = ""
    """Folder of this phase, such as runs/demo/stage1."""
    seed: int = 0
    max_steps: int = 1000
    batch_size: int = 128
    """Samples per step over all ranks and accumulation steps."""
    micro_batch_size: int = 0
    """Samples per forward pass and rank; 0: a rank's whole share at once."""
    log_every_steps: int = 10
    save_every_steps: int = 500
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    keep_best_by: str = "train/loss"
    """Metric whose lowest mean between two saves marks the best checkpoint, which is kept too; empty: keep none."""
    num_threads: int = 0
    """CPU threads per process; 0: torch's default."""
    loggers: list[str] = field(default_factory=list)
    """Additional copies of metrics.jsonl: tensorboard, wandb."""

    def is_logged(self, step: int) -> bool:
        """Whether metrics.jsonl has a row for step number `step`, counted from 1."""
        return step % self.log_every_steps == 0 or step in (1, self.max_steps)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 0")
        unknown = set(self.loggers) - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(f"loop.loggers: unknown logger '{unknown.pop()}'; use tensorboard or wandb")
