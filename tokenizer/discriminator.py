"""Discriminators: PatchGAN with a logit per overlapping patch, and a residual one with a logit per image.

Neither has batch statistics (BatchNorm, minibatch deviation), which would differ between ranks, micro-batches and a
resumed run. Legend: B batch, C channels.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from um3.core.errors import UserError

DiscriminatorKind = Literal["patch", "residual"]


class PatchDiscriminator(nn.Module):
    """`num_layers` convolutions of stride 2, then two of stride 1; one logit per receptive field."""

    def __init__(self, *, channels: int, num_layers: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider, stride = min(channels * 2**index, channels * 8), 2 if index < num_layers else 1
            layers.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Images -> logits (B, 1, h, w), positive for real."""
        return self.layers(pixels_BCHW.to(next(self.parameters()).dtype))


class ResidualDiscriminator(nn.Module):
    """The discriminator of StyleGAN2 (Karras et al. 2020): residual blocks that halve the image, one logit per image.

    Each of the `num_layers` blocks doubles the width, up to 8 times `channels`.
    """

    def __init__(self, *, channels: int, num_layers: int):
        super().__init__()
        widths = [min(channels * 2**index, channels * 8) for index in range(num_layers + 1)]
        self.stem = nn.Conv2d(3, widths[0], 1)
        self.blocks = nn.ModuleList(_HalvingBlock(*pair) for pair in itertools.pairwise(widths))
        self.last = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.head = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.LeakyReLU(0.2), nn.Linear(widths[-1], 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Images -> logits (B, 1), positive for real."""
        x = F.leaky_relu(self.stem(pixels_BCHW.to(self.stem.weight.dtype)), 0.2)
        for block in self.blocks:
            x = block(x)
        return self.head(F.leaky_relu(self.last(x), 0.2).mean(dim=(-2, -1)))


class _HalvingBlock(nn.Module):
    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1)
        self.skip = nn.Conv2d(narrow, wide, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = F.leaky_relu(self.second(F.leaky_relu(self.first(x_BCHW), 0.2)), 0.2)
        return (F.avg_pool2d(inner, 2) + self.skip(F.avg_pool2d(x_BCHW, 2))) / math.sqrt(2)


def build_discriminator(kind: DiscriminatorKind, *, channels: int, num_layers: int, image_size: int) -> nn.Module:
    """A discriminator with fresh weights; UserError if it does not fit images of `image_size` pixels a side."""
    build = {"patch": PatchDiscriminator, "residual": ResidualDiscriminator}[kind]
    try:
        with torch.device("meta"):
            build(channels=channels, num_layers=num_layers)(torch.empty(1, 3, image_size, image_size))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        problem = f"discriminator of kind {kind} with channels={channels} and num_layers={num_layers} does not fit"
        remedy = "set discriminator.channels to a multiple of 8, or num_layers lower"
        raise UserError(f"{problem} images of {image_size} pixels ({reason}); {remedy}") from None
    return build(channels=channels, num_layers=num_layers)
