"""`python -m train plan --config NAME --gpus N --gpu NAME`: what fits on which GPUs, and how long training takes.

One line for each ZeRO stage with and without activation checkpointing, at the largest micro-batch that fits (at
most the config's): the peak memory of one device (`train/plan/memory.py`), tokens per second, days for
`loop.max_steps`. Nothing is downloaded or allocated; the model is built from its config alone.

Time is floating-point operations divided by the achieved rate (--mfu x the GPUs' peak). Counted are matrix
products, with 2 operations a multiply-add and 3 forward passes for forward and backward (2 for a frozen weight, which
has no gradient): the layers' weights for every token, attention's scores and values (in full, also if causal: PaLM,
arXiv 2204.02311, appendix B), and for every target the output head's rows of its half. Activation checkpointing repeats
the layers' forward pass and the loss its logits: that takes time, but is not a model FLOP. --mfu covers communication,
reading and saving. `--phase llamagen` adds the frozen text encoder: its weights, and its forward pass over captions of
the greatest length.
"""

import argparse
import itertools
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from train.config import EngineConfig
from train.settings.llamagen import LlamaGenTrainingConfig
from train.settings.um3 import UM3Config
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError
from um3.core.log import quiet_model_files

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

    from train.plan.memory import Trace, Tracer, Usage

PHASES: dict[str, type[Any]] = {"um3": UM3Config, "llamagen": LlamaGenTrainingConfig}
GIB = 2**30
MFU = 0.35
"""A little below the 0.38 to 0.43 of Llama 3 in bf16 on H100s with custom kernels (arXiv 2407.21783, table 4)."""
KEPT_FREE = 0.1
"""Share of a GPU's memory for the CUDA context, NCCL, cuBLAS, fragmentation, and the error of the prediction."""
CAPTION_TOKENS = 64
PARTS = ("weights", "optimizer", "gradients", "activations", "working", "buffers")


class Gpu(NamedTuple):
    """Memory (GiB) and dense peak rates (TFLOP/s): bf16 on tensor cores, float32 without TF32."""

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float


GPUS = {
    "a100-40": Gpu(40, 312, 19.5),
    "a100-80": Gpu(80, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l4": Gpu(24, 121, 30.3),
    "l40s": Gpu(48, 362, 91.6),
    "rtx3090": Gpu(24, 71, 35.6),
    "rtx4060": Gpu(8, 30.2, 15.1),
    "rtx4080": Gpu(16, 97.5, 48.7),
    "rtx4090": Gpu(24, 165, 82.6),
    "rtx5090": Gpu(32, 210, 105),
    "cpu": Gpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, math.nan, math.nan),
}
"""From NVIDIA's data sheets (SXM boards if they exist) and, for RTX, its architecture papers. "cpu" is this
machine, whose rate is unknown."""


class Setting(NamedTuple):
    """Engine options and a micro-batch size (samples)."""

    zero_stage: int
    precision: str
    checkpointing: bool
    micro_batch: int


class Plan(ABC):
    """The training of a config on `devices` GPUs of one kind, which must divide its batch."""

    objective: Any
    """On the meta device; its `model` has the method gradient_checkpointing_enable."""
    head: int
    """Elements of the output head."""
    beside_bytes = 0.0
    """Weights on every device that are no part of the objective."""

    def __init__(self, config: Any, *, devices: int, gpu: str):
        self.share, rest = divmod(config.loop.batch_size, devices)
        if rest:
            raise UserError(
                f"loop.batch_size={config.loop.batch_size} is not divisible by --gpus {devices}; change one"
            )
        self.config, self.devices, self.gpu, self.on_cpu = config, devices, GPUS[gpu], gpu == "cpu"
        self.traces: dict[Setting, Trace] = {}
        self.tracers: dict[str, Tracer] = {}
        self.build()
        self.parameters, frozen = sizes(self.objective.parameters())
        self.frozen = sum(frozen)

    @abstractmethod
    def build(self) -> None:
        """Build the objective on the meta device, and set all fields of the phase."""

    @abstractmethod
    def traced(self) -> tuple["Module", "Module"]:
        """Another objective on the meta device, and the part of it that ends where the layers end."""

    @abstractmethod
    def micro_batch(self, size: int) -> "tuple[Tensor, ...]":
        """The objective's arguments for `size` samples."""

    @abstractmethod
    def step_tokens(self) -> tuple[float, float]:
        """Tokens of a step's sequences with padding, and without."""

    @abstractmethod
    def step_flops(self, *, checkpointing: bool) -> tuple[float, float]:
        """Model FLOPs of a step, and FLOPs of what is computed twice."""

    def lines(self) -> Iterator[tuple[Setting, "Usage", bool]]:
        """(setting, memory, fits) of every ZeRO stage that supports the optimizer, with and without checkpointing:
        at the largest micro-batch that fits, or at one sample."""
        for stage, checkpointing in itertools.product((0, 1, 2, 3), (False, True)):
            engine = self._engine(stage)
            if engine is None:
                continue
            for micro_batch in self.micro_batches():
                setting = Setting(stage, engine.precision, checkpointing, micro_batch)
                usage = self.usage(setting)
                if fits := self.fits(usage):
                    break
            yield setting, usage, fits

    def micro_batches(self) -> list[int]:
        """The divisors of a device's share of the batch up to the config's micro-batch, largest first."""
        largest = self.config.loop.micro_batch_size or self.share
        return [size for size in range(min(largest, self.share), 0, -1) if self.share % size == 0]

    def own(self) -> Setting | None:
        """The config's own setting; None if its engine or batch is refused."""
        engine, micro_batch = self.config.engine, self.config.loop.micro_batch_size or self.share
        allowed = self._engine(engine.zero_stage)
        if allowed is None or allowed.precision != self._precision() or self.share % micro_batch:
            return None
        return Setting(engine.zero_stage, allowed.precision, engine.activation_checkpointing, micro_batch)

    def usage(self, setting: Setting) -> "Usage":
        """Peak memory of one device."""
        from train.plan.memory import Layout, usage

        engine, optimizer = self.config.engine, self.config.optimizer
        layout = Layout(
            zero_stage=setting.zero_stage,
            devices=self.devices,
            parameters=sum(self.parameters),
            largest=max(self.parameters),
            head=self.head,
            weight_bytes=2 if setting.precision == "bf16-true" else 4,
            bucket_elements=engine.bucket_elements,
            frozen=self.frozen,
            average=optimizer.ema_decay > 0,
            fused=engine.fused_kernels == "auto" and optimizer.kind == "adamw",
            offload=engine.offload_optimizer and setting.zero_stage > 0,
            accumulates=setting.micro_batch < self.share,
            on_cpu=self.on_cpu,
            beside_bytes=self.beside_bytes,
        )
        return usage(layout, self._trace(setting))

    def fits(self, usage: "Usage") -> bool:
        """Whether the GPU holds it and KEPT_FREE of its memory stays free."""
        return usage.total <= (1 - KEPT_FREE) * self.gpu.memory_gib * GIB

    def step_seconds(self, setting: Setting, *, mfu: float) -> float:
        """Time of a step at this utilisation; nan if the device's rate is unknown."""
        model_flops, repeated_flops = self.step_flops(checkpointing=setting.checkpointing)
        rate = self.gpu.float32_tflops if setting.precision == "fp32" else self.gpu.bf16_tflops
        return (model_flops + repeated_flops) / (self.devices * rate * 1e12 * mfu)

    def _engine(self, zero_stage: Any) -> EngineConfig | None:
        """The config's engine at this stage, with bf16-mixed instead of bf16-true at ZeRO 0; None if it is refused."""
        from train.engine import check_engine

        precision = self._precision()
        if precision == "bf16-true" and zero_stage == 0:
            precision = "bf16-mixed"
        engine = replace(self.config.engine, zero_stage=zero_stage, precision=precision, offload_optimizer=False)
        try:
            check_engine(engine, optimizer=self.config.optimizer)
        except UserError:
            return None
        return engine

    def _precision(self) -> Any:
        import torch

        from train.engine import precision_of

        return precision_of(self.config.engine, on=torch.device("cpu" if self.on_cpu else "cuda"))

    def _trace(self, setting: Setting) -> "Trace":
        from train.plan.memory import Tracer

        key = setting._replace(zero_stage=0)
        if key not in self.traces:
            if setting.precision not in self.tracers:
                objective, body = self.traced()
                self.tracers[setting.precision] = Tracer(objective, body=body, precision=setting.precision)
            tracer = self.tracers[setting.precision]
            switch = "enable" if setting.checkpointing else "disable"
            getattr(tracer.objective.model, f"gradient_checkpointing_{switch}")()
            inputs = self.micro_batch(setting.micro_batch)
            self.traces[key] = tracer.trace(*inputs, shares={0.0, 1.0, 1 / self.devices})
        return self.traces[key]


def sizes(parameters: "Iterable[Parameter]") -> tuple[list[int], list[int]]:
    """Elements of each trained parameter, and of each frozen one."""
    parts: tuple[list[int], list[int]] = ([], [])
    for parameter in parameters:
        parts[not parameter.requires_grad].append(parameter.numel())
    return parts


def main(arguments: Sequence[str]) -> None:
    """Print the table, then the memory of the config's own setting."""
    config, options = _options(arguments)
    # transformers 5 deprecates this method in favour of another; the recipes call it too.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of norms under autocast
    quiet_model_files()
    plan = open_plan(config, devices=options.gpus, gpu=options.gpu)
    tokens, unpadded = plan.step_tokens()
    trained, frozen = f"{sum(plan.parameters) / 1e9:.3f}e9", f" + {plan.frozen / 1e9:.3f}e9 frozen" * (plan.frozen > 0)
    beside = f" and {plan.beside_bytes / GIB:.2f} GiB of the text encoder" * (plan.beside_bytes > 0)
    print(
        f"{trained}{frozen} parameters{beside} on {options.gpus} x {options.gpu} of {plan.gpu.memory_gib:.0f} GiB, "
        f"{KEPT_FREE:.0%} of it kept free. A step: {config.loop.batch_size} samples, {tokens:,.0f} tokens "
        f"({1 - unpadded / tokens:.0%} padding), {plan.step_flops(checkpointing=False)[0] / 1e15:.3g} PFLOP at "
        f"{options.mfu:.0%} of the peak; {config.loop.max_steps:,} steps."
    )
    heads = ["ZeRO", "precision", "checkpointing", "micro-batch", *PARTS, "GiB", "moment", "fits", "tokens/s", "days"]
    _print_table([heads, *(_cells(plan, *line, mfu=options.mfu) for line in plan.lines())])
    if (setting := plan.own()) is None:
        print("The config's own setting cannot run; change engine or loop.micro_batch_size.")
        return
    usage = plan.usage(setting)
    print("The config's own setting:")
    _print_table([heads, _cells(plan, setting, usage, plan.fits(usage), mfu=options.mfu)])


def _cells(plan: Plan, setting: Setting, usage: "Usage", fits: bool, *, mfu: float) -> list[str]:
    seconds = plan.step_seconds(setting, mfu=mfu)
    tokens, _ = plan.step_tokens()
    days = seconds * plan.config.loop.max_steps / 86_400
    gib = [f"{getattr(usage, part) / GIB:.2f}" for part in (*PARTS, "total")]
    shown = f"{days:.3g}" if days >= 0.01 else f"{days:.5f}"
    speed = ["-", "-"] if math.isnan(days) else [f"{tokens / seconds:,.0f}", shown]
    engine = [str(setting.zero_stage), setting.precision, "yes" if setting.checkpointing else "no"]
    return [*engine, str(setting.micro_batch), *gib, usage.moment, "yes" if fits else "NO", *speed]


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def open_plan(config: Any, *, devices: int, gpu: str) -> Plan:
    """The plan of a config of one of PHASES."""
    from train.plan.llamagen import LlamaGenPlan
    from train.plan.um3 import UM3Plan

    kind = LlamaGenPlan if isinstance(config, LlamaGenTrainingConfig) else UM3Plan
    return kind(config, devices=devices, gpu=gpu)


def _options(arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    parser = command_parser("python -m train plan", str(__doc__), config="required")
    parser.add_argument("--phase", choices=PHASES, default="um3", help="what is trained (default um3)")
    parser.add_argument("--gpus", type=int, default=8, help="total number of GPUs (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"model FLOPs utilisation (default {MFU})")
    phase = parser.parse_intermixed_args(arguments).phase
    config, options = read_config(PHASES[phase], parser, section=phase, arguments=arguments)
    if options.gpu not in GPUS:
        raise UserError(f"--gpu '{options.gpu}' is not known; use one of {', '.join(GPUS)}")
    if options.gpus < 1:
        raise UserError(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")
    return config, options
