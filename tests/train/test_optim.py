"""LAMB and Muon against plain transcriptions, per-module rates, schedules."""

import math

import pytest
import torch
from torch import nn

from train.config import OptimizerConfig
from train.muon import orthogonalise, orthogonalise_all
from train.optim import Lamb, build_optimizer, schedule_factor, set_learning_rate
from um3.core.errors import UserError


def plain_lamb(weight, gradients, *, lr, decay):
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
def test_lamb_follows_the_reference_trajectory(decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(20)]
    weight = nn.Parameter(start.clone())
    optimizer = Lamb([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), plain_lamb(start, gradients, lr=0.01, decay=decay))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalising_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    (update,) = orthogonalise_all([matrix])
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = (u.T @ update @ vh.T) / (0.2 * max(shape) ** 0.5)
    assert values.diagonal().min() > 0.5 and values.diagonal().max() < 1.3
    torch.testing.assert_close(values - values.diagonal().diag(), torch.zeros_like(values), atol=1e-4, rtol=0)
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


def test_muon_steps_layer_matrices_by_momentum_and_the_rest_like_adamw():
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6)]), "head": nn.Linear(4, 6)})
    named = [(f"body.{name}", parameter) for name, parameter in model.named_parameters()]
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(named, config=config)
    twin = nn.Linear(4, 6)
    twin.load_state_dict(model["head"].state_dict())
    adamw = build_optimizer(twin.named_parameters(), config=OptimizerConfig(lr=0.1, weight_decay=0.5))
    expected, momentum = model["layers"][0].weight.detach().clone(), torch.zeros(6, 4)
    for one in (optimizer, adamw):
        set_learning_rate(one, factor=1.0)
    for _ in range(3):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        twin.weight.grad, twin.bias.grad = model["head"].weight.grad, model["head"].bias.grad
        gradient = model["layers"][0].weight.grad
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = 0.05 * gradient + 0.95 * momentum
        x = direction / direction.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.775 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * x
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(model["layers"][0].weight.detach(), expected)
    torch.testing.assert_close(model["head"].weight, twin.weight)
    torch.testing.assert_close(model["head"].bias, twin.bias)


def test_groups_by_module_rate_and_decay():
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


def test_a_rate_for_no_parameter_is_an_error():
    with pytest.raises(UserError, match="decodr"):
        build_optimizer(nn.Linear(2, 2).named_parameters(), config=OptimizerConfig(module_lr={"decodr": 1.0}))


def test_schedule_warms_up_and_falls_along_a_cosine():
    config = OptimizerConfig(warmup_steps=4, final_lr_ratio=0.1)
    factors = [schedule_factor(step, max_steps=104, config=config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[104] == pytest.approx(0.1) and min(factors) >= 0.1
    assert factors[29] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    constant = OptimizerConfig(schedule="constant", warmup_steps=0)
    assert schedule_factor(77, max_steps=100, config=constant) == 1.0
