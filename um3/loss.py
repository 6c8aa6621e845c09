"""The split softmax: a text target competes with text entries only, a visual target with visual entries only.

Equation 6 of the paper, against logit shift between the modalities; "joint" is the usual softmax over all
entries, kept for the ablation. The head is applied only where there is a target and only with the rows of the
target's half, chunk by chunk with recomputation, so no (positions x full vocabulary) tensor is ever held.

Shapes: B batch, T positions, D width, V entries, X supervised positions.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LossMode = Literal["split", "joint"]
# 2,048 positions x 128,258 float32 text logits = 1 GiB.
DEFAULT_CHUNK_TOKENS = 2048


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

    The caller has shifted already: `hidden_BTD[:, t]` predicts `target_ids_BT[:, t]`. Logits are float32 whatever
    the hidden states are. `z_loss` is the coefficient of logsumexp^2 (0 switches it off).
    """
    if mode not in ("split", "joint"):
        raise ValueError(f"loss mode '{mode}' is unknown; use 'split' or 'joint'")
    is_text_BT = supervised_BT & (target_ids_BT < text_vocab_size)
    is_visual_BT = supervised_BT & (target_ids_BT >= text_vocab_size)
    split = mode == "split"
    text_rows_VD = lm_head_weight_VD[:text_vocab_size] if split else lm_head_weight_VD
    visual_rows_VD = lm_head_weight_VD[text_vocab_size:] if split else lm_head_weight_VD
    text_sum, text_z_sum = _half(
        hidden_BTD[is_text_BT],
        rows_VD=text_rows_VD,
        targets_X=target_ids_BT[is_text_BT],
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
    )
    visual_sum, visual_z_sum = _half(
        hidden_BTD[is_visual_BT],
        rows_VD=visual_rows_VD,
        targets_X=target_ids_BT[is_visual_BT] - (text_vocab_size if split else 0),
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
    )
    return SplitLoss(
        text_sum=text_sum,
        visual_sum=visual_sum,
        text_z_sum=text_z_sum,
        visual_z_sum=visual_z_sum,
        text_count=is_text_BT.sum(),
        visual_count=is_visual_BT.sum(),
    )


def _half(
    hidden_XD: Tensor, *, rows_VD: Tensor, targets_X: Tensor, z_loss: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    # A half without targets still touches its inputs: with every rank's graph alike, a sharded backward cannot hang.
    if len(hidden_XD) <= chunk_tokens:
        return _chunk(hidden_XD, rows_VD, targets_X, z_loss)
    sums = [
        checkpoint(_chunk, hidden_CD, rows_VD, targets_C, z_loss, use_reentrant=False)
        for hidden_CD, targets_C in zip(hidden_XD.split(chunk_tokens), targets_X.split(chunk_tokens), strict=True)
    ]
    return torch.stack([loss for loss, _ in sums]).sum(), torch.stack([z for _, z in sums]).sum()


def _chunk(hidden_XD: Tensor, rows_VD: Tensor, targets_X: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits_XV = F.linear(hidden_XD, rows_VD).float()
    loss = F.cross_entropy(logits_XV, targets_X, reduction="sum")
    z = z_loss * torch.logsumexp(logits_XV, dim=-1).square().sum() if z_loss else loss.new_zeros(())
    return loss, z
