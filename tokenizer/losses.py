"""QLIP's training losses (SPEC section 1, stages 1 and 2).

The perceptual one is LPIPS with VGG-16, or without its weights a seeded random-feature network.

Legend: B local batch, C samples of a chunk (channels of an image), G global batch (all ranks), P projection.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from um3.core.distributed import gather_with_gradient, rank
from um3.core.errors import UserError
from um3.core.hub import read_tensors
from um3.core.seeds import torch_generator

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1024  # x 65,536 float32 logits = 256 MiB
VGG16_PLAN = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RANDOM_PLAN = ((16, 16), (32, 32), (64, 64))
# LPIPS's input normalisation, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


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
    image_loss, accuracy = retrieval(image_embeds_BP, text_GP, target_B, logit_scale)
    text_loss, _ = retrieval(text_embeds_BP, image_GP, target_B, logit_scale)
    return ContrastiveLoss((image_loss + text_loss) / 2, accuracy)


def retrieval(query_BP: Tensor, key_GP: Tensor, target_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
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


class PerceptualDistance(nn.Module):
    """Distance of two images in the unit-normalised features of a convolutional network, summed over its stages.

    With VGG-16's ImageNet weights and LPIPS's linear heads it is LPIPS (Zhang et al. 2018), `name` "lpips_vgg". With
    fewer channels, seeded random weights and uniform heads it is "random_features", not comparable with LPIPS.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, plan: Sequence[Sequence[int]], name: str):
        super().__init__()
        self.name = name
        stages, width = [], 3
        for index, widths in enumerate(plan):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for wider in widths:
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ParameterList(torch.full((widths[-1],), 1.0 / widths[-1]) for widths in plan)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        """Mean distance over the batch of images in [-1, 1]; scalar."""
        x, y = ((image - self.shift) / self.scale for image in (first_BCHW, second_BCHW))
        total = first_BCHW.new_zeros(())
        for stage, head_C in zip(self.stages, self.heads, strict=True):
            x, y = stage(x), stage(y)
            unit_x, unit_y = (f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in (x, y))
            total = total + ((unit_x - unit_y).square() * head_C.view(1, -1, 1, 1)).sum(1).mean()
        return total


def random_feature_distance() -> PerceptualDistance:
    """The distance without downloaded weights: seeded and frozen."""
    distance = PerceptualDistance(plan=RANDOM_PLAN, name="random_features")
    generator = torch_generator(0, "random-feature distance")
    for parameter in distance.stages.parameters():
        parameter.data.zero_()
        if parameter.dim() == 4:  # a convolution's weight, not its bias
            std = (2.0 / parameter[0].numel()) ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return distance.requires_grad_(False).eval()


def lpips_vgg(*, backbone: str | Path, heads: str | Path) -> PerceptualDistance:
    """LPIPS-VGG from torchvision's VGG-16 weights (`vgg16-397923af.pth`) and LPIPS's linear heads (`vgg.pth`).

    UserError: a file is missing or holds other tensors.
    """
    distance = PerceptualDistance(plan=VGG16_PLAN, name="lpips_vgg")
    features, linear = read_tensors(backbone), read_tensors(heads)
    position = 0
    try:
        for index, stage in enumerate(distance.stages):
            for layer in stage.children():
                for name, parameter in layer.named_parameters():
                    parameter.data.copy_(features[f"features.{position}.{name}"])
                position += 1
            distance.heads[index].data.copy_(linear[f"lin{index}.model.1.weight"].flatten())
    except (KeyError, RuntimeError) as error:
        problem = f"{backbone} or {heads} is not VGG-16 with LPIPS heads ({error})"
        raise UserError(f"{problem}; docs/tokenizer.md names the two files") from None
    return distance.requires_grad_(False).eval()


def build_perceptual_distance(*, backbone: str, heads: str) -> PerceptualDistance:
    """LPIPS-VGG if both files are set, else the random-feature distance, which is logged."""
    if backbone and heads:
        return lpips_vgg(backbone=backbone, heads=heads)
    if backbone or heads:
        raise UserError("LPIPS needs both perceptual.backbone and perceptual.heads; set both, or neither")
    logger.info("perceptual.backbone is empty: the perceptual loss is a seeded random-feature distance, not LPIPS")
    return random_feature_distance()
