"""The perceptual loss of stage 2: LPIPS with VGG-16, or without its weights a seeded random-feature network.

Legend: B batch, C channels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from um3.core.errors import UserError
from um3.core.hub import read_tensors
from um3.core.seeds import torch_generator

logger = logging.getLogger(__name__)

VGG16_PLAN = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RANDOM_PLAN = ((16, 16), (32, 32), (64, 64))
# LPIPS's input normalisation, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


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
