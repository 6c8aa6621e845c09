"""The split softmax against the plain computation over the full vocabulary, in value and gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.tensor_sizes import TensorSizes
from tokenizer import onednn
from um3.model import split_softmax as loss_module
from um3.model.split_softmax import split_softmax_loss

NUM_TEXT, NUM_ENTRIES = 30, 75


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    supervised: Tensor


def make_batch(*, kind="both"):
    generator = torch.Generator().manual_seed(0)
    low, high = {"both": (0, NUM_ENTRIES), "text": (0, NUM_TEXT), "visual": (NUM_TEXT, NUM_ENTRIES)}[kind]
    return Batch(
        hidden=torch.randn(3, 21, 16, generator=generator).requires_grad_(),
        weight=torch.randn(NUM_ENTRIES, 16, generator=generator).requires_grad_(),
        targets=torch.randint(low, high, (3, 21), generator=generator),
        supervised=torch.rand(3, 21, generator=generator) < 0.7,
    )


def naive(batch, *, mode, z_loss):
    """Full-vocabulary logits, with the other half masked out under "split"."""
    logits_BTV = batch.hidden @ batch.weight.T
    is_text_BT = batch.targets < NUM_TEXT
    if mode == "split":
        entry_is_text_V = torch.arange(NUM_ENTRIES) < NUM_TEXT
        logits_BTV = logits_BTV.masked_fill(is_text_BT[..., None] != entry_is_text_V, float("-inf"))
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses_BT = losses_BT.view(3, 21) + z_loss * logits_BTV.logsumexp(-1).square()
    return tuple((losses_BT * (batch.supervised & half)).sum() for half in (is_text_BT, ~is_text_BT))


def ours(batch, **options):
    options |= {"target_ids_BT": batch.targets, "supervised_BT": batch.supervised, "text_vocab_size": NUM_TEXT}
    return split_softmax_loss(batch.hidden, lm_head_weight_VD=batch.weight, **options)


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [1000, 7])
def test_value_and_gradient_equal_the_plain_computation(mode, z_loss, chunk_tokens):
    batch = make_batch()
    loss = ours(batch, mode=mode, z_loss=z_loss, chunk_tokens=chunk_tokens)
    halves = (loss.text_sum + loss.text_z_sum, loss.visual_sum + loss.visual_z_sum)
    expected = naive(batch, mode=mode, z_loss=z_loss)
    torch.testing.assert_close(halves, expected, rtol=1e-5, atol=1e-5)
    # Unequal weights, so that a mix-up of the halves shows in the gradient.
    inputs = (batch.hidden, batch.weight)
    gradients = (torch.autograd.grad(0.3 * text + 2 * visual, inputs) for text, visual in (halves, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("num_frozen", [NUM_TEXT - 2, NUM_TEXT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_rows_change_no_loss_and_get_no_gradient(mode, num_frozen, dtype):
    batch = make_batch()
    frozen_FD = batch.weight[:num_frozen].detach()
    trained = batch._replace(weight=batch.weight[num_frozen:].detach().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole = ours(batch, mode=mode, z_loss=0.01, chunk_tokens=7)
        part = ours(trained, mode=mode, z_loss=0.01, chunk_tokens=7, frozen_rows_FD=frozen_FD)
    assert all(torch.equal(*sums) for sums in zip(part, whole, strict=True))
    total, expected = (0.3 * loss.text_sum + 2 * loss.visual_sum + loss.text_z_sum for loss in (part, whole))
    hidden_BTD, weight_VD = torch.autograd.grad(expected, (batch.hidden, batch.weight))
    gradients = torch.autograd.grad(total, (trained.hidden, trained.weight))
    torch.testing.assert_close(gradients, (hidden_BTD, weight_VD[num_frozen:]), rtol=1e-5, atol=1e-5)
    assert weight_VD[num_frozen:NUM_TEXT].any(-1).all() and not frozen_FD.requires_grad


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("kind", ["text", "nothing"])
def test_an_empty_half_is_zero_with_zero_gradient(mode, kind):
    batch = make_batch(kind="text")
    if kind == "nothing":
        batch = batch._replace(supervised=torch.zeros_like(batch.supervised))
    loss = ours(batch, mode=mode, z_loss=0.1)
    assert loss.visual_sum == loss.visual_count == 0 and loss.text_count == batch.supervised.sum()
    total = loss.visual_sum + loss.visual_z_sum
    total = total + loss.text_sum + loss.text_z_sum if kind == "nothing" else total
    for gradient in torch.autograd.grad(total, (batch.hidden, batch.weight)):
        assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("uses_onednn", [False, True])
def test_the_head_is_applied_only_at_targets_of_its_half(uses_onednn, monkeypatch):
    monkeypatch.setattr(onednn, "IS_FASTER", uses_onednn)
    monkeypatch.setattr(loss_module, "ONEDNN_ROWS", 1)  # any length
    batch = make_batch()
    with TensorSizes() as seen:
        loss = ours(batch, chunk_tokens=1000)
    text, visual = int(loss.text_count), int(loss.visual_count)
    assert 0 < text < 63 - visual
    assert seen.products == [(text, NUM_TEXT), (visual, NUM_ENTRIES - NUM_TEXT)]
    with seen:
        (loss.text_sum + loss.visual_sum).backward()
    again = [shape for shape in seen.products[2:] if shape[1] != 16]  # the gradients have the width, 16
    assert again == seen.products[:2] and len(seen.products) == 8


@pytest.mark.parametrize("limit", ["tokens", "bytes"])
@pytest.mark.parametrize("mode", ["split", "joint"])
def test_no_tensor_is_larger_than_one_chunk_of_logits(mode, limit, monkeypatch):
    wide, chunk = make_batch(), 20
    hidden_BTD, weight_VD = (wide_D[..., :4].detach().requires_grad_() for wide_D in (wide.hidden, wide.weight))
    batch = wide._replace(hidden=hidden_BTD, weight=weight_VD)  # both smaller than a chunk's logits
    chunk_size = chunk * (NUM_ENTRIES if mode == "joint" else NUM_ENTRIES - NUM_TEXT)
    if limit == "bytes":
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * chunk_size)
    with TensorSizes() as seen:
        loss = ours(batch, mode=mode, z_loss=0.1, chunk_tokens=chunk if limit == "tokens" else 1000)
        (loss.text_sum + loss.visual_sum + loss.text_z_sum + loss.visual_z_sum).backward()
    assert seen.largest == chunk_size and loss.visual_count > chunk


def test_no_logits_are_saved_for_the_backward_pass():
    batch = make_batch()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        ours(batch, chunk_tokens=1000)
    assert max(sizes) == max(batch.hidden.numel(), batch.weight.numel())


@pytest.mark.parametrize("kind", ["derived", "tied"])
def test_the_head_may_be_computed_from_parameters_or_shared_with_the_input(kind):
    batch = make_batch()
    base_VD, change_VD = batch.weight, torch.randn(NUM_ENTRIES, 16, requires_grad=True)
    inputs = (batch.hidden, base_VD, change_VD)
    if kind == "derived":
        batch = batch._replace(weight=base_VD + change_VD)
    else:
        batch = batch._replace(hidden=batch.hidden + base_VD[batch.targets] * change_VD[0])
    text, visual = naive(batch, mode="split", z_loss=0.0)
    expected = torch.autograd.grad(0.3 * text + 2 * visual, inputs, retain_graph=True)
    loss = ours(batch, chunk_tokens=7)
    gradients = torch.autograd.grad(0.3 * loss.text_sum + 2 * loss.visual_sum, inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_bfloat16_weights_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden_BTD, weight_VD = (torch.randn(*shape, generator=generator) for shape in ((1, 600, 16), (NUM_ENTRIES, 16)))
    targets_BT = torch.randint(NUM_ENTRIES, (1, 600), generator=generator)

    def gradient(dtype):
        hidden, weight = (tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in (hidden_BTD, weight_VD))
        loss = ours(Batch(hidden, weight, targets_BT, torch.ones(1, 600, dtype=torch.bool)), chunk_tokens=1)
        (gradient_VD,) = torch.autograd.grad(loss.text_sum + loss.visual_sum, weight)
        assert gradient_VD.dtype == dtype
        return gradient_VD.float()

    exact = gradient(torch.float32)
    # Each of the 600 terms is rounded to 8 bits, by itself; summed in 8 bits they would be 2 % off.
    assert (gradient(torch.bfloat16) - exact).norm() < 0.005 * exact.norm()


def test_autocast_multiplies_in_its_type_and_gives_float32_gradients():
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ours(batch, z_loss=0.01, chunk_tokens=7)
    low = ours(batch._replace(hidden=batch.hidden.bfloat16(), weight=batch.weight.bfloat16()), z_loss=0.01)
    torch.testing.assert_close(cast.text_sum, low.text_sum)
    assert low.text_sum.dtype == torch.float32
    assert cast.text_sum != ours(batch).text_sum
    inputs = (batch.hidden, batch.weight)
    gradients = [torch.autograd.grad(loss.text_sum + loss.visual_z_sum, inputs) for loss in (cast, low)]
    for gradient, exact in zip(*gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_invalid_options_are_refused():
    with pytest.raises(ValueError, match="'both' is unknown"):
        ours(make_batch(), mode="both")
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        ours(make_batch(), chunk_tokens=0)
