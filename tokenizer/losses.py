"""QLIP's training losses (SPEC section 1, stages 1 and 2).

Legend: B local batch, C samples of a chunk, G global batch (all ranks), P projection.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from um3.core.distributed import gather_with_gradient, rank

CHUNK_ROWS = 1024  # x 65,536 float32 logits = 256 MiB


class ContrastiveLoss(NamedTuple):
    """InfoNCE, and the share of images whose own caption has the highest logit."""

    loss: Tensor
    accuracy: Tensor


def info_nce(image_embeds_BP: Tensor, text_embeds_BP: Tensor, *, logit_scale: Tensor) -> ContrastiveLoss:
    """Symmetric InfoNCE of the local batch against the global batch (paper, L_align).

    The embeddings are l2-normalised; `logit_scale` is the multiplier itself (exp of CLIP's parameter). The mean of the
    loss over ranks is the loss of the global batch. At most `CHUNK_ROWS` rows of the (B, G) logits are in memory at a
    time; a larger batch recomputes its chunks for the gradient.
    """
    image_GP, text_GP = gather_with_gradient(image_embeds_BP), gather_with_gradient(text_embeds_BP)
    batch_size = len(image_embeds_BP)
    first = rank() * batch_size if len(image_GP) != batch_size else 0
    target_B = torch.arange(first, first + batch_size, device=image_embeds_BP.device)
    image_loss, accuracy = _retrieval(image_embeds_BP, text_GP, target_B, logit_scale)
    text_loss, _ = _retrieval(text_embeds_BP, image_GP, target_B, logit_scale)
    return ContrastiveLoss((image_loss + text_loss) / 2, accuracy)


def _retrieval(query_BP: Tensor, key_GP: Tensor, target_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy of each query's own key among all keys."""
    if len(query_BP) <= CHUNK_ROWS:
        loss, hits = _retrieval_sums(query_BP, key_GP, target_B, scale)
    else:
        sums = [
            checkpoint(_retrieval_sums, query_CP, key_GP, target_C, scale, use_reentrant=False)
            for query_CP, target_C in zip(query_BP.split(CHUNK_ROWS), target_B.split(CHUNK_ROWS), strict=True)
        ]
        loss, hits = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return loss / len(query_BP), hits / len(query_BP)


def _retrieval_sums(query_CP: Tensor, key_GP: Tensor, target_C: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits_CG = scale * query_CP @ key_GP.T
    loss = F.cross_entropy(logits_CG, target_C, reduction="sum")
    return loss, torch.eq(logits_CG.argmax(-1), target_C).float().sum().detach()


AdversarialKind = Literal["hinge", "non_saturating"]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: AdversarialKind) -> Tensor:
    """The discriminator's loss on its logits of real and of reconstructed images (any shape); scalar."""
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits: Tensor, *, kind: AdversarialKind) -> Tensor:
    """The tokenizer's adversarial loss on the logits of its reconstructions (weight a_g); scalar."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()
