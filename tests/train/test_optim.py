"""LAMB against a plain transcription, per-module rates, schedules."""

import math

import pytest
import torch
from torch import nn

from train.config import OptimizerConfig
from train.optim import Lamb, build_optimizer, schedule_factor, set_learning_rate
from um3.core.errors import UserError


def plain_lamb(weight: torch.Tensor, gradients: list[torch.Tensor], *, lr: float, decay: float) -> torch.Tensor:
    """Algorithm 2 of You et al. with bias correction, one tensor, no tricks."""
    m, v, w = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        r = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6) + decay * w
        ratio = min(float(w.norm() / r.norm()), 10.0) if decay and w.norm() > 0 else 1.0
        w = w - lr * ratio * r
    return w


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_lamb_follows_the_reference_trajectory(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(20)]
    weight = nn.Parameter(start.clone())
    optimizer = Lamb([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), plain_lamb(start, gradients, lr=0.01, decay=decay))


def test_groups_by_module_rate_and_decay() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    config = OptimizerConfig(lr=1.0, module_lr={"encoder": 0.5, "encoder.bias": 0.1}, weight_decay=0.2)
    optimizer = build_optimizer(model.named_parameters(), config=config)
    set_learning_rate(optimizer, factor=0.5)
    found = {
        (tuple(parameter.shape), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {((3, 3), 0.25, 0.2), ((3,), 0.05, 0.0), ((3, 3), 0.5, 0.2), ((3,), 0.5, 0.0)}


def test_a_rate_for_no_parameter_is_an_error() -> None:
    with pytest.raises(UserError, match="decodr"):
        build_optimizer(nn.Linear(2, 2).named_parameters(), config=OptimizerConfig(module_lr={"decodr": 1.0}))


def test_schedule_warms_up_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(warmup_steps=4, final_lr_ratio=0.1)
    factors = [schedule_factor(step, total_steps=104, config=config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[104] == pytest.approx(0.1) and min(factors) >= 0.1
    assert factors[29] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    constant = OptimizerConfig(schedule="constant", warmup_steps=0)
    assert schedule_factor(77, total_steps=100, config=constant) == 1.0
