"""The perceptual loss of stage 2: LPIPS with VGG-16, or a seeded random-feature network without its weights.

The two have different names in every metric. Legend: B batch, C channels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from um3.core.errors import UserError
from um3.core.hub import read_tensors
from um3.core.seeds import derive_seed

logger = logging.getLogger(__name__)

VGG16_PLAN = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# LPIPS's input normalisation, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualDistance(nn.Module):
    """Distance of two images in the unit-normalised features of a convolutional network, summed over its stages.

    With VGG-16's ImageNet weights and LPIPS's linear heads it is LPIPS (Zhang et al. 2018), `name` "lpips_vgg". With
    fewer channels, random weights of a fixed seed and uniform heads it is "random_features": a multi-scale texture
    distance that is not comparable with LPIPS.
    """

    shift: torch.Tensor
    scale: torch.Tensor

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

    def forward(self, first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        """Mean distance over the batch of images in [-1, 1]; scalar."""
        x, y = ((image - self.shift) / self.scale for image in (first_BCHW, second_BCHW))
        total = first_BCHW.new_zeros(())
        for stage, head_C in zip(self.stages, self.heads, strict=True):
            x, y = stage(x), stage(y)
            difference = (self._unit(x) - self._unit(y)).square()
            total = total + (difference * head_C.view(1, -1, 1, 1)).sum(1).mean()
        return total

    @staticmethod
    def _unit(x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW / (x_BCHW.square().sum(1, keepdim=True) + 1e-10).sqrt()


def random_feature_distance(*, width: int = 16, num_stages: int = 3) -> PerceptualDistance:
    """The distance without downloaded weights: seeded and frozen."""
    plan = [(min(width * 2**index, 8 * width),) * 2 for index in range(num_stages)]
    distance = PerceptualDistance(plan=plan, name="random_features")
    generator = torch.Generator().manual_seed(derive_seed(0, "random-feature distance"))
    for module in distance.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * 9
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2.0 / fan_in) ** 0.5
            if module.bias is not None:
                module.bias.data.zero_()
    return distance.requires_grad_(False).eval()


def lpips_vgg(*, backbone: str | Path, heads: str | Path) -> PerceptualDistance:
    """LPIPS-VGG from the two published files.

    Args:
        backbone: torchvision's VGG-16 weights (`vgg16-397923af.pth`: keys `features.N.weight`).
        heads: LPIPS's linear heads (`vgg.pth`: keys `linI.model.1.weight`).

    Raises:
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
        raise UserError(
            f"{backbone} or {heads} is not VGG-16 with LPIPS heads ({error}); docs/tokenizer.md names the two files"
        ) from None
    return distance.requires_grad_(False).eval()


def build_perceptual_distance(*, backbone: str, heads: str) -> PerceptualDistance:
    """LPIPS-VGG if both files are set, else the random-feature distance, which is logged."""
    if backbone and heads:
        return lpips_vgg(backbone=backbone, heads=heads)
    if backbone or heads:
        raise UserError("LPIPS needs both perceptual.backbone and perceptual.heads; set both, or neither")
    logger.info("perceptual.backbone is empty: the perceptual loss is a seeded random-feature distance, not LPIPS")
    return random_feature_distance()
