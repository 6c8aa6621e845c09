"""QLIP's training losses (SPEC section 1, stages 1 and 2).

Legend: B local batch, C rows of a chunk, G global batch (all ranks), P projection.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from um3.core.distributed import gather_with_gradient, rank

# 1,024 rows x 65,536 float32 logits = 256 MiB.
DEFAULT_CHUNK_ROWS = 1024


class ContrastiveLoss(NamedTuple):
    """InfoNCE and how often the right caption came first."""

    loss: torch.Tensor
    accuracy: torch.Tensor


def info_nce(
    image_embeds_BP: torch.Tensor,
    text_embeds_BP: torch.Tensor,
    *,
    logit_scale: torch.Tensor,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> ContrastiveLoss:
    """Symmetric InfoNCE of the local rows against the global batch (paper, L_align).

    The embeddings are l2-normalised; `logit_scale` is the multiplier itself (exp of CLIP's parameter). The
    mean of this value over ranks is the loss of the global batch. Of the (B, G) logits no more than `chunk_rows` rows
    exist at one time; more rows than that are computed again for the gradient.
    """
    image_GP, text_GP = gather_with_gradient(image_embeds_BP), gather_with_gradient(text_embeds_BP)
    num_rows = len(image_embeds_BP)
    first = rank() * num_rows if len(image_GP) != num_rows else 0
    target_B = torch.arange(first, first + num_rows, device=image_embeds_BP.device)
    image_loss, accuracy = _retrieval(image_embeds_BP, text_GP, target_B, logit_scale, chunk_rows=chunk_rows)
    text_loss, _ = _retrieval(text_embeds_BP, image_GP, target_B, logit_scale, chunk_rows=chunk_rows)
    return ContrastiveLoss((image_loss + text_loss) / 2, accuracy)


def _retrieval(
    query_BP: torch.Tensor, key_GP: torch.Tensor, target_B: torch.Tensor, scale: torch.Tensor, *, chunk_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy and accuracy of finding each query's own key among all."""
    if len(query_BP) <= chunk_rows:
        loss, hits = _retrieval_sums(query_BP, key_GP, target_B, scale)
    else:
        sums = [
            checkpoint(_retrieval_sums, query_CP, key_GP, target_C, scale, use_reentrant=False)
            for query_CP, target_C in zip(query_BP.split(chunk_rows), target_B.split(chunk_rows), strict=True)
        ]
        loss, hits = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return loss / len(query_BP), hits / len(query_BP)


def _retrieval_sums(
    query_CP: torch.Tensor, key_GP: torch.Tensor, target_C: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_CG = scale * query_CP @ key_GP.T
    loss = F.cross_entropy(logits_CG, target_C, reduction="sum")
    return loss, torch.eq(logits_CG.argmax(-1), target_C).float().sum().detach()


AdversarialKind = Literal["hinge", "non_saturating"]


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, *, kind: AdversarialKind) -> torch.Tensor:
    """What the discriminator minimises on logits of real and of reconstructed images (any shape)."""
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits: torch.Tensor, *, kind: AdversarialKind) -> torch.Tensor:
    """What the tokenizer minimises so that its reconstructions pass as real (weight a_g)."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()
