"""QLIP's training losses (SPEC section 1, stages 1 and 2).

Legend: B local batch, G global batch (all ranks), P projection.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from um3.core.distributed import gather_with_gradient, rank


class ContrastiveLoss(NamedTuple):
    """InfoNCE and how often the right caption came first."""

    loss: torch.Tensor
    accuracy: torch.Tensor


def info_nce(
    image_embeds_BP: torch.Tensor, text_embeds_BP: torch.Tensor, *, logit_scale: torch.Tensor
) -> ContrastiveLoss:
    """Symmetric InfoNCE of the local rows against the global batch (paper, L_align).

    The embeddings are l2-normalised; `logit_scale` is the multiplier itself (exp of CLIP's parameter). The
    mean of this value over ranks is the loss of the global batch.
    """
    image_GP, text_GP = gather_with_gradient(image_embeds_BP), gather_with_gradient(text_embeds_BP)
    per_image_BG = logit_scale * image_embeds_BP @ text_GP.T
    per_text_BG = logit_scale * text_embeds_BP @ image_GP.T
    target_B = torch.arange(len(image_embeds_BP), device=image_embeds_BP.device)
    if len(image_GP) != len(image_embeds_BP):
        target_B = target_B + rank() * len(image_embeds_BP)
    loss = (F.cross_entropy(per_image_BG, target_B) + F.cross_entropy(per_text_BG, target_B)) / 2
    return ContrastiveLoss(loss, (per_image_BG.argmax(-1) == target_B).float().mean().detach())


AdversarialKind = Literal["hinge", "non_saturating"]


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, *, kind: AdversarialKind) -> torch.Tensor:
    """What the discriminator minimises on logits of real and of reconstructed images (any shape)."""
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits: torch.Tensor, *, kind: AdversarialKind) -> torch.Tensor:
    """What the tokenizer minimises so that its reconstructions pass as real (weight a_g)."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()
