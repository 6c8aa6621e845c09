"""Optimizers, per-module learning rates and schedules (SPEC section 1, Table 8; section 2, Table 9)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from train.config import OptimizerConfig
from train.muon import Muon
from um3.core.errors import UserError

MAX_TRUST_RATIO = 10.0


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020): Adam's direction, scaled per tensor by ||w|| / ||update||.

    Parameters without weight decay (biases, norms, scales) take the Adam step, as in the reference implementation.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        beta1, beta2 = group["betas"]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
        states = [self.state[param] for param in params]
        grads = [param.grad for param in params]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        step = float(states[0]["step"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(means, 1 - beta1**step), denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            weight_norms, update_norms = torch._foreach_norm(params), torch._foreach_norm(updates)
            ratios = [
                torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)).clamp(max=MAX_TRUST_RATIO)
                for w, u in zip(weight_norms, update_norms, strict=True)
            ]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimizer, with the trainable parameters grouped by peak learning rate and weight decay.

    Groups hold "peak_lr" for `set_learning_rate` and "ema_decay" for the engine. Muon steps the matrices in the layers.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    unused = set(config.module_lr)
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        prefixes = [prefix for prefix in config.module_lr if name.startswith(prefix)]
        unused -= set(prefixes)
        peak = config.module_lr[max(prefixes, key=len)] if prefixes else config.lr
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        orthogonal = config.kind == "muon" and parameter.ndim == 2 and ".layers." in name
        groups.setdefault((peak, decay, orthogonal), []).append(parameter)
    if not groups:
        raise UserError("every parameter is frozen; change `trainable`")
    if unused:
        prefixes = sorted(unused)
        raise UserError(f"optimizer.module_lr: no trainable parameter starts with {', '.join(prefixes)}; correct it")
    options = [
        dict(params=params, lr=0.0, peak_lr=peak, weight_decay=decay, ema_decay=config.ema_decay)
        | ({"shapes": [tuple(param.shape) for param in params]} if orthogonal else {})
        for (peak, decay, orthogonal), params in groups.items()
    ]
    kind = {"adamw": torch.optim.AdamW, "lamb": Lamb, "muon": Muon}[config.kind]
    return kind(options, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)


def schedule_factor(step: int, *, max_steps: int, config: OptimizerConfig) -> float:
    """Learning rate at `step` (from 0) as a share of the peak: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def other_length(config: Any, *, old: dict[str, Any], steps: int) -> str:
    """What it means that a run, after `steps` steps, resumes with another `loop.max_steps` than in its `old` config;
    empty if it does not."""
    length, old_length = config.loop.max_steps, old["loop"]["max_steps"]
    if length == old_length:
        return ""
    configs = [config, replace(config, loop=replace(config.loop, max_steps=old_length))]
    now, before = (
        [
            [schedule_factor(step, max_steps=part.loop.max_steps, config=optimizer) for optimizer in _optimizers(part)]
            for step in range(steps + 1)
        ]
        for part in configs
    )
    note = f"loop.max_steps: {old_length} -> {length}; "
    if now[:steps] == before[:steps]:
        return note + f"a run of {length} steps from the start has had the same {steps} steps"
    rates = f"of step {steps + 1} is {now[steps][0]:.3g} of its peak, where it was {before[steps][0]:.3g}"
    return note + f"the learning rate {rates}: the result is not that of a run of {length} steps from the start"


def _optimizers(config: Any) -> list[OptimizerConfig]:
    """The optimizers of a phase; LLaVA's phases derive theirs."""
    parts = [config.schedule] if hasattr(config, "schedule") else vars(config).values()
    return [part for part in parts if isinstance(part, OptimizerConfig)]


def set_learning_rate(optimizer: torch.optim.Optimizer, *, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
