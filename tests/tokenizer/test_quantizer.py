"""Binary spherical quantization against brute force over all corners."""

import itertools
import math

import pytest
import torch

from tests.helpers.tensor_sizes import TensorSizes
from tokenizer.quantizer import BinarySphericalQuantizer, codebook_entropy


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("inv_temperature", [1.0, 10.0])
def test_entropies_equal_brute_force(group_size, inv_temperature):
    """(E[H], H[E]) from an explicit softmax over every corner of every group."""
    quantizer = BinarySphericalQuantizer(embed_dim=6, group_size=group_size, inv_temperature=inv_temperature)
    z = torch.nn.functional.normalize(normal(40, 6), dim=-1)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=group_size))) / math.sqrt(6)
    expected_sample = expected_codebook = 0.0
    for z_group in z.split(group_size, dim=-1):
        p = (2 * inv_temperature * z_group @ corners.T).softmax(-1)
        expected_sample += float(-(p * p.log()).sum(-1).mean())
        expected_codebook += float(-(p.mean(0) * p.mean(0).log()).sum())
    sample, mean_GK = quantizer.soft_code(z.view(4, 10, 6))
    assert float(sample) == pytest.approx(expected_sample, rel=1e-5)
    assert float(codebook_entropy(mean_GK)) == pytest.approx(expected_codebook, rel=1e-5)


def test_values_codes_and_straight_through_gradient():
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


def test_quantizer_stays_in_float32_under_autocast():
    quantizer, z = BinarySphericalQuantizer(embed_dim=28), normal(2, 16, 28)
    outside = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    assert inside.quantized_BNL.dtype == torch.float32
    assert torch.equal(inside.loss, outside.loss) and torch.equal(inside.codes_BN, outside.codes_BN)


@pytest.mark.parametrize("group_size", [3, 14])
def test_invalid_groups_are_refused(group_size):
    with pytest.raises(ValueError, match="group_size"):
        BinarySphericalQuantizer(embed_dim=28, group_size=group_size)


@pytest.mark.parametrize(("bits", "group_size"), [(28, 1), (28, 4), (60, 1)])
def test_memory_grows_with_bits_not_with_corners(bits, group_size):
    z = normal(4, 1024, bits).requires_grad_()
    quantizer = BinarySphericalQuantizer(embed_dim=bits, group_size=group_size)
    with TensorSizes() as sizes:
        output = quantizer(z)
        (output.loss + output.quantized_BNL.square().sum() + output.commitment).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and int(output.codes_BN.min()) >= 0
    assert z.numel() <= sizes.largest <= 8 * z.numel()
