"""The split softmax: a text target competes with text entries only, a visual target with visual entries only.

Equation 6 of the paper, against logit shift between the modalities. "joint" is the usual softmax over all entries, for
the ablation. The head is applied chunk by chunk, to positions with a target and with the rows of the target's half. The
backward pass computes a chunk's logits again, so at most one chunk of logits exists at a time.

Shapes: B batch, T positions, N = B * T of them, C positions of a chunk, D width, V entries, R entries of a half,
F frozen rows of the head, M = V - F trained ones.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer import onednn

LossMode = Literal["split", "joint"]
DEFAULT_CHUNK_TOKENS = 2048
# Limit of a chunk's float32 logits: 523 positions of 128,258 text entries, 2,048 positions of 32,768 visual ones.
CHUNK_BYTES = 2**28
ONEDNN_ROWS = 64
"""oneDNN keeps a kernel for every length it has seen, so it gets multiples of this only."""


Chunk = tuple[Tensor, Tensor, slice]
"""Positions of one half (C), their targets relative to the first of its rows (C), and those rows of the head."""


class SplitLoss(NamedTuple):
    """Sums over this batch, to be divided by the counts of all ranks; sums have a gradient, counts do not.

    `text_sum` and `visual_sum` are cross entropies in nats; `text_z_sum` and `visual_z_sum` are z-losses times their
    coefficient.
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
    frozen_rows_FD: Tensor | None = None,
) -> SplitLoss:
    """Cross entropy of `target_ids_BT` given the hidden states at the same index, per half of the vocabulary.

    The caller has shifted the targets: `hidden_BTD[:, t]` predicts `target_ids_BT[:, t]`. Matrix products have the type
    of the hidden states (or autocast's); softmax, sums and the head's gradient over the chunks are float32. Both inputs
    get a gradient even where nothing is supervised, so that a sharded backward cannot hang. `z_loss` is the coefficient
    of logsumexp^2 (0: off). Logits exist for at most `chunk_tokens` positions at a time, fewer if these would exceed
    CHUNK_BYTES. `frozen_rows_FD` are rows of the head before those of `lm_head_weight_VD`, at most the text entries;
    they get no gradient. ValueError: an unknown mode, or `chunk_tokens` below 1.
    """
    if mode not in ("split", "joint"):
        raise ValueError(f"loss mode '{mode}' is unknown; use 'split' or 'joint'")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    frozen_FD = lm_head_weight_VD[:0].detach() if frozen_rows_FD is None else frozen_rows_FD
    middle, end = text_vocab_size, len(frozen_FD) + len(lm_head_weight_VD)
    rows_of_halves = [slice(0, middle), slice(middle, end)] if mode == "split" else [slice(0, end)] * 2
    target_ids_N, supervised_N = target_ids_BT.flatten(), supervised_BT.flatten()
    halves_N = [supervised_N & (target_ids_N < middle), supervised_N & (target_ids_N >= middle)]
    chunks = [
        (positions_C, target_ids_N[positions_C] - rows.start, rows)
        for is_half_N, rows in zip(halves_N, rows_of_halves, strict=True)
        for positions_C in _split(is_half_N.nonzero().squeeze(-1), rows=rows, chunk_tokens=chunk_tokens)
    ]
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
    target_logits_N, logsumexp_N = _Logits.apply(hidden_BTD.flatten(0, 1), lm_head_weight_VD, frozen_FD, chunks, dtype)
    values_N = (logsumexp_N - target_logits_N, z_loss * logsumexp_N.square())
    sums = [value_N[is_half_N].sum() for value_N in values_N for is_half_N in halves_N]
    return SplitLoss(*sums, *(is_half_N.sum() for is_half_N in halves_N))


def _split(positions_N: Tensor, *, rows: slice, chunk_tokens: int) -> tuple[Tensor, ...]:
    """Chunks of the longest length, then the remainder in two: a multiple of ONEDNN_ROWS, and fewer."""
    longest = min(chunk_tokens, max(CHUNK_BYTES // (4 * max(rows.stop - rows.start, 1)), 1))
    longest -= longest % ONEDNN_ROWS if longest > ONEDNN_ROWS else 0
    full, rest = divmod(len(positions_N), longest)
    few = rest % ONEDNN_ROWS
    return positions_N.split([size for size in (*[longest] * full, rest - few, few) if size])


class _Logits(torch.autograd.Function):
    """(hidden_ND, weight_MD, frozen_FD) -> the target's logit and logsumexp of its half, (N,), 0 outside the chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_MD: Tensor, frozen_FD: Tensor, chunks: list[Chunk], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows_VD = _join(frozen_FD, weight_MD, dtype=dtype)
        target_logits_N, logsumexp_N = hidden_ND.new_zeros(2, len(hidden_ND), dtype=torch.float32)
        for positions_C, targets_C, rows in chunks:
            target_logits_N[positions_C], logsumexp_N[positions_C] = _reduce(
                hidden_ND[positions_C].to(dtype), rows_VD[rows], targets_C=targets_C
            )
        # Detached, the weight stays whole until the backward pass, when ZeRO 3 has released the parameter.
        ctx.save_for_backward(hidden_ND, weight_MD.detach(), frozen_FD.detach(), logsumexp_N)
        ctx.chunks, ctx.dtype = chunks, dtype
        return target_logits_N, logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_target_N, grad_logsumexp_N = gradients
        hidden_ND, weight_MD, frozen_FD, logsumexp_N = ctx.saved_tensors
        rows_VD, num_frozen = _join(frozen_FD, weight_MD, dtype=ctx.dtype), len(frozen_FD)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_MD = torch.zeros_like(weight_MD, dtype=torch.float32)
        for positions_C, targets_C, rows in ctx.chunks:
            hidden_CD = hidden_ND[positions_C].to(ctx.dtype)
            grad_CR = _linear(hidden_CD, rows_VD[rows]).float().sub_(logsumexp_N[positions_C, None]).exp_()
            grad_CR.mul_(grad_logsumexp_N[positions_C, None])
            grad_CR[torch.arange(len(grad_CR), device=grad_CR.device), targets_C] += grad_target_N[positions_C]
            first = max(rows.start, num_frozen)
            grad_trained_CM = grad_CR[:, first - rows.start :]
            trained = slice(first - num_frozen, rows.stop - num_frozen)
            if ctx.dtype == torch.float32:
                grad_weight_MD[trained].addmm_(grad_trained_CM.T, hidden_CD)
            else:
                grad_weight_MD[trained] += grad_trained_CM.to(ctx.dtype).T @ hidden_CD
            grad_hidden_ND[positions_C] = _linear(grad_CR.to(ctx.dtype), rows_VD[rows].T).to(hidden_ND.dtype)
            del grad_CR, grad_trained_CM  # free them before the next chunk
        return grad_hidden_ND, grad_weight_MD.to(weight_MD.dtype), None, None, None


def _join(frozen_FD: Tensor, weight_MD: Tensor, *, dtype: torch.dtype) -> Tensor:
    """All rows of the head, in `dtype`; the weight itself if it has that type and nothing is frozen."""
    if not len(frozen_FD):
        return weight_MD.to(dtype)
    rows_VD = weight_MD.new_empty(len(frozen_FD) + len(weight_MD), weight_MD.shape[1], dtype=dtype)
    rows_VD[: len(frozen_FD)], rows_VD[len(frozen_FD) :] = frozen_FD, weight_MD
    return rows_VD


def _reduce(hidden_CD: Tensor, rows_RD: Tensor, *, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' logits and the logsumexp over all rows, (C,) each."""
    logits_CR = _linear(hidden_CD, rows_RD).float()
    target_logits_C = logits_CR.gather(-1, targets_C[:, None]).squeeze(-1)
    # torch.logsumexp in place: on a CPU, filling a second tensor of this size takes as long as the exponentials.
    highest_C = logits_CR.amax(-1)
    return target_logits_C, logits_CR.sub_(highest_C[:, None]).exp_().sum(-1).log() + highest_C


def _linear(x_CD: Tensor, rows_RD: Tensor) -> Tensor:
    if len(x_CD) % ONEDNN_ROWS == 0 and onednn.serves(x_CD, rows_RD):
        return onednn.linear(x_CD, rows_RD)
    return F.linear(x_CD, rows_RD)
