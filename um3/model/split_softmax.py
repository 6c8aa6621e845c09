"""The split softmax: a text target competes with text entries only, a visual target with visual entries only.

Equation 6 of the paper, against logit shift between the modalities; "joint" is the usual softmax over all
entries, kept for the ablation. The head is applied only where there is a target and only with the rows of the
target's half, chunk by chunk; the backward pass computes a chunk's logits again and turns them into their gradient
where they stand. So no (positions x full vocabulary) tensor ever exists, and of the logits no more than one chunk.

Shapes: B batch, T positions, N = B * T of them, C positions of a chunk, D width, V entries, R entries of a half.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from um3.core import onednn

LossMode = Literal["split", "joint"]
DEFAULT_CHUNK_TOKENS = 2048
# Of a chunk's logits, in float32: 523 positions of 128,258 text entries, 2,048 of 32,768 visual ones.
CHUNK_BYTES = 2**28
ONEDNN_ROWS = 64
"""oneDNN keeps a kernel for every length that it has seen, so it is given multiples of this one only."""


class SplitLoss(NamedTuple):
    """Sums over this batch, to be divided by the counts of all ranks together; sums carry gradient, counts do not.

    `text_sum` and `visual_sum` are cross entropies in nats; `text_z_sum` and `visual_z_sum` are the z-losses,
    coefficient included.
    """

    text_sum: Tensor
    visual_sum: Tensor
    text_z_sum: Tensor
    visual_z_sum: Tensor
    text_count: Tensor
    visual_count: Tensor


def split_softmax_loss(
    hidden_BTD: Tensor,
    *,
    lm_head_weight_VD: Tensor,
    target_ids_BT: Tensor,
    supervised_BT: Tensor,
    text_vocab_size: int,
    mode: LossMode = "split",
    z_loss: float = 0.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> SplitLoss:
    """Cross entropy of `target_ids_BT` given the hidden states at the same index, per half of the vocabulary.

    The caller has shifted already: `hidden_BTD[:, t]` predicts `target_ids_BT[:, t]`. Matrix products are in the type
    of the hidden states (under autocast, in its type); softmax, sums, and the head's gradient over the chunks are in
    float32. Both inputs have a gradient even where nothing is supervised, so that a sharded backward cannot hang.
    `z_loss` is the coefficient of logsumexp^2 (0 switches it off). At a time, logits exist for `chunk_tokens` positions
    at most, and for fewer where these would take more than CHUNK_BYTES.

    Raises:
        ValueError: an unknown mode, or chunks of no position.
    """
    if mode not in ("split", "joint"):
        raise ValueError(f"loss mode '{mode}' is unknown; use 'split' or 'joint'")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    text_rows, visual_rows = slice(0, text_vocab_size), slice(text_vocab_size, len(lm_head_weight_VD))
    if mode == "joint":
        text_rows = visual_rows = slice(0, len(lm_head_weight_VD))
    target_ids_N, supervised_N = target_ids_BT.flatten(), supervised_BT.flatten()
    is_text_N = supervised_N & (target_ids_N < text_vocab_size)
    is_visual_N = supervised_N & (target_ids_N >= text_vocab_size)
    chunks = [
        _Chunk(places_C, target_ids_N[places_C] - rows.start, rows)
        for is_half_N, rows in ((is_text_N, text_rows), (is_visual_N, visual_rows))
        for places_C in _pieces(is_half_N.nonzero().squeeze(-1), longest=_chunk_length(rows, chunk_tokens=chunk_tokens))
    ]
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
    target_logits_N, logsumexp_N = _Logits.apply(hidden_BTD.flatten(0, 1), lm_head_weight_VD, chunks, dtype)
    losses_N, z_losses_N = logsumexp_N - target_logits_N, z_loss * logsumexp_N.square()
    return SplitLoss(
        text_sum=losses_N[is_text_N].sum(),
        visual_sum=losses_N[is_visual_N].sum(),
        text_z_sum=z_losses_N[is_text_N].sum(),
        visual_z_sum=z_losses_N[is_visual_N].sum(),
        text_count=is_text_N.sum(),
        visual_count=is_visual_N.sum(),
    )


class _Chunk(NamedTuple):
    """Positions of one half, their targets counted from the first of `rows`, and the head's rows that compete there."""

    places_C: Tensor
    targets_C: Tensor
    rows: slice


def _chunk_length(rows: slice, *, chunk_tokens: int) -> int:
    logits_bytes = 4 * max(rows.stop - rows.start, 1)
    length = min(chunk_tokens, max(CHUNK_BYTES // logits_bytes, 1))
    return length - length % ONEDNN_ROWS if length > ONEDNN_ROWS else length


def _pieces(places_N: Tensor, *, longest: int) -> tuple[Tensor, ...]:
    """Chunks of the longest length, then what is left in two: a multiple of ONEDNN_ROWS, and fewer."""
    full, rest = divmod(len(places_N), longest)
    few = rest % ONEDNN_ROWS
    return places_N.split([size for size in (*[longest] * full, rest - few, few) if size])


class _Logits(torch.autograd.Function):
    """(hidden_ND, weight_VD) -> the target's logit and the logsumexp of its rivals, (N,) each, 0 outside the chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, chunks: list[_Chunk], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows_VD = weight_VD.to(dtype)
        target_logits_N, logsumexp_N = hidden_ND.new_zeros(2, len(hidden_ND), dtype=torch.float32)
        for places_C, targets_C, rows in chunks:
            target_logits_N[places_C], logsumexp_N[places_C] = _reduce(
                hidden_ND[places_C].to(dtype), rows_VD[rows], targets_C=targets_C
            )
        # Detached, the weight stays whole until the backward pass, where ZeRO 3 has let go of the parameter.
        ctx.save_for_backward(hidden_ND, weight_VD.detach(), logsumexp_N)
        ctx.chunks, ctx.dtype = chunks, dtype
        return target_logits_N, logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_target_N, grad_logsumexp_N = gradients
        hidden_ND, weight_VD, logsumexp_N = ctx.saved_tensors
        rows_VD = weight_VD.to(ctx.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for places_C, targets_C, rows in ctx.chunks:
            hidden_CD = hidden_ND[places_C].to(ctx.dtype)
            grad_CR = _linear(hidden_CD, rows_VD[rows]).float().sub_(logsumexp_N[places_C, None]).exp_()
            grad_CR.mul_(grad_logsumexp_N[places_C, None])
            grad_CR[torch.arange(len(grad_CR), device=grad_CR.device), targets_C] += grad_target_N[places_C]
            _add_product(grad_weight_VD[rows], grad_CR.to(ctx.dtype).T, hidden_CD)
            grad_hidden_ND[places_C] = _linear(grad_CR.to(ctx.dtype), rows_VD[rows].T).to(hidden_ND.dtype)
            del grad_CR  # before the next one is made
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def _reduce(hidden_CD: Tensor, rows_RD: Tensor, *, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' logits and the logsumexp of all."""
    logits_CR = _linear(hidden_CD, rows_RD).float()
    target_logits_C = logits_CR.gather(-1, targets_C[:, None]).squeeze(-1)
    # torch.logsumexp in place: to fill a second tensor of this size takes a CPU as long as the exponentials.
    highest_C = logits_CR.amax(-1)
    return target_logits_C, logits_CR.sub_(highest_C[:, None]).exp_().sum(-1).log() + highest_C


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where `total` may be of a finer type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _linear(x_CD: Tensor, rows_RD: Tensor) -> Tensor:
    """x W^T."""
    if len(x_CD) % ONEDNN_ROWS == 0 and onednn.serves(x_CD, rows_RD):
        return onednn.linear(x_CD, rows_RD)
    return F.linear(x_CD, rows_RD)
