"""Binary spherical quantization against brute force over all corners."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.quantizer import BinarySphericalQuantizer, codebook_entropy


def brute_force_entropies(z: torch.Tensor, *, inv_temperature: float, groups: list[list[int]]) -> tuple[float, float]:
    """(E[H], H[E]) from an explicit softmax over every corner of every group."""
    sample, codebook = 0.0, 0.0
    for group in groups:
        corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(group)))) / math.sqrt(z.shape[-1])
        p = (2 * inv_temperature * z[:, group] @ corners.T).softmax(-1)
        sample += float(-(p * p.log()).sum(-1).mean())
        codebook += float(-(p.mean(0) * p.mean(0).log()).sum())
    return sample, codebook


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("inv_temperature", [1.0, 10.0])
def test_entropies_equal_brute_force(group_size: int, inv_temperature: float) -> None:
    quantizer = BinarySphericalQuantizer(embed_dim=6, group_size=group_size, inv_temperature=inv_temperature)
    z = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    groups = [list(range(start, start + group_size)) for start in range(0, 6, group_size)]
    expected = brute_force_entropies(z, inv_temperature=inv_temperature, groups=groups)
    sample, mean_GK = quantizer.soft_code(z.view(4, 10, 6))
    codebook = codebook_entropy(mean_GK)
    assert float(sample) == pytest.approx(expected[0], rel=1e-5)
    assert float(codebook) == pytest.approx(expected[1], rel=1e-5)


def test_values_codes_and_straight_through_gradient() -> None:
    quantizer = BinarySphericalQuantizer(embed_dim=4)
    z = torch.tensor([[[0.3, -0.1, 2.0, -5.0]]], requires_grad=True)
    output = quantizer(z)
    assert output.quantized_BNL.tolist() == [[[0.5, -0.5, 0.5, -0.5]]]
    assert output.codes_BN.tolist() == [[0b1010]]
    output.quantized_BNL.backward(torch.ones(1, 1, 4))
    unit = z.detach() / z.detach().norm()
    tangent = torch.ones(1, 1, 4) - unit * unit.sum()
    torch.testing.assert_close(z.grad, tangent / z.detach().norm() * 0.5)
    assert torch.equal(quantizer.codes_to_quantized(output.codes_BN), output.quantized_BNL.detach())


def test_quantizer_stays_in_float32_under_autocast() -> None:
    quantizer = BinarySphericalQuantizer(embed_dim=28)
    z = torch.randn(2, 16, 28, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    outside = quantizer(z)
    assert inside.quantized_BNL.dtype == torch.float32
    assert torch.equal(inside.loss, outside.loss) and torch.equal(inside.codes_BN, outside.codes_BN)


def test_memory_grows_with_bits_not_with_corners() -> None:
    """60 bits: anything of size 2^L would not fit any machine."""
    quantizer = BinarySphericalQuantizer(embed_dim=60)
    z = torch.randn(2, 8, 60, requires_grad=True)
    output = quantizer(z)
    (output.loss + output.commitment).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and int(output.codes_BN.min()) >= 0


@pytest.mark.parametrize("group_size", [3, 14])
def test_senseless_groups_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match="group_size"):
        BinarySphericalQuantizer(embed_dim=28, group_size=group_size)


class Largest(TorchDispatchMode):
    """The most elements any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            self.elements = max(self.elements, each.numel() if isinstance(each, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("group_size", [1, 4])
def test_nothing_grows_beyond_a_few_times_the_input(group_size: int) -> None:
    z = torch.randn(64, 1024, 28, requires_grad=True)
    quantizer = BinarySphericalQuantizer(embed_dim=28, group_size=group_size)
    with Largest() as largest:
        output = quantizer(z)
        (output.loss + output.quantized_BNL.square().sum() + output.commitment).backward()
    assert z.grad is not None and z.numel() <= largest.elements <= 8 * z.numel()
