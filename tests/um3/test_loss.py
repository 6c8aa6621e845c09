"""The split softmax against the plain computation over the full vocabulary, in value and gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from um3 import loss as loss_module
from um3.loss import LossMode, split_softmax_loss

NUM_TEXT, NUM_ENTRIES = 30, 75


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    supervised: Tensor


def make_batch(*, kind: str = "both") -> Batch:
    generator = torch.Generator().manual_seed(0)
    low, high = {"both": (0, NUM_ENTRIES), "text": (0, NUM_TEXT), "visual": (NUM_TEXT, NUM_ENTRIES)}[kind]
    return Batch(
        hidden=torch.randn(3, 21, 16, generator=generator).requires_grad_(),
        weight=torch.randn(NUM_ENTRIES, 16, generator=generator).requires_grad_(),
        targets=torch.randint(low, high, (3, 21), generator=generator),
        supervised=torch.rand(3, 21, generator=generator) < 0.7,
    )


def naive(batch: Batch, *, mode: LossMode, z_loss: float) -> tuple[Tensor, Tensor]:
    """Full-vocabulary logits, with the other half masked out under "split"."""
    logits_BTV = batch.hidden @ batch.weight.T
    is_text_BT = batch.targets < NUM_TEXT
    if mode == "split":
        entry_is_text_V = torch.arange(NUM_ENTRIES) < NUM_TEXT
        logits_BTV = logits_BTV.masked_fill(is_text_BT[..., None] != entry_is_text_V, float("-inf"))
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses_BT = losses_BT.view(3, 21) + z_loss * logits_BTV.logsumexp(-1).square()
    return tuple((losses_BT * (batch.supervised & half)).sum() for half in (is_text_BT, ~is_text_BT))  # type: ignore[return-value]


def ours(batch: Batch, **options: object) -> loss_module.SplitLoss:
    return split_softmax_loss(
        batch.hidden,
        lm_head_weight_VD=batch.weight,
        target_ids_BT=batch.targets,
        supervised_BT=batch.supervised,
        text_vocab_size=NUM_TEXT,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [1000, 7])
def test_value_and_gradient_equal_the_plain_computation(mode: LossMode, z_loss: float, chunk_tokens: int) -> None:
    batch = make_batch()
    found = ours(batch, mode=mode, z_loss=z_loss, chunk_tokens=chunk_tokens)
    text, visual = naive(batch, mode=mode, z_loss=z_loss)
    torch.testing.assert_close(found.text_sum + found.text_z_sum, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.visual_sum + found.visual_z_sum, visual, rtol=1e-5, atol=1e-5)
    # Unequal weights, so that a mix-up of the halves shows in the gradient.
    inputs = (batch.hidden, batch.weight)
    found_gradients = torch.autograd.grad(
        0.3 * (found.text_sum + found.text_z_sum) + 2 * (found.visual_sum + found.visual_z_sum), inputs
    )
    for found_gradient, gradient in zip(
        found_gradients, torch.autograd.grad(0.3 * text + 2 * visual, inputs), strict=True
    ):
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-5)


def test_counts_are_of_supervised_targets_per_half() -> None:
    batch = make_batch()
    found = ours(batch)
    assert found.text_count == ((batch.targets < NUM_TEXT) & batch.supervised).sum()
    assert found.text_count + found.visual_count == batch.supervised.sum()


@pytest.mark.parametrize("mode", ["split", "joint"])
def test_an_empty_half_is_zero_with_zero_gradient(mode: LossMode) -> None:
    batch = make_batch(kind="text")
    found = ours(batch, mode=mode, z_loss=0.1)
    assert found.visual_sum == 0 and found.visual_count == 0
    for gradient in torch.autograd.grad(found.visual_sum + found.visual_z_sum, (batch.hidden, batch.weight)):
        assert gradient is not None and not gradient.any()


def test_split_leaves_the_other_halfs_rows_alone() -> None:
    batch = make_batch(kind="visual")
    (gradient_VD,) = torch.autograd.grad(ours(batch).visual_sum, batch.weight)
    assert not gradient_VD[:NUM_TEXT].any() and gradient_VD[NUM_TEXT:].any()
    (gradient_VD,) = torch.autograd.grad(ours(batch, mode="joint").visual_sum, batch.weight)
    assert gradient_VD[:NUM_TEXT].any()


@pytest.mark.parametrize(("chunk_tokens", "is_kept"), [(4, False), (1000, True)])
def test_a_tensor_of_positions_by_rows_is_kept_only_within_one_chunk(chunk_tokens: int, is_kept: bool) -> None:
    batch = make_batch(kind="visual")
    sizes = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        ours(batch, chunk_tokens=chunk_tokens)
    assert (max(sizes) > max(batch.hidden.numel(), batch.weight.numel())) == is_kept


def test_logits_are_float32_under_bfloat16_states() -> None:
    batch = make_batch()
    low = batch._replace(hidden=batch.hidden.bfloat16(), weight=batch.weight.bfloat16())
    found = ours(low)
    assert found.text_sum.dtype == torch.float32
    torch.testing.assert_close(found.text_sum, ours(batch).text_sum, rtol=2e-2, atol=0.5)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'both' is unknown"):
        ours(make_batch(), mode="both")
