"""PatchGAN: a convolutional discriminator that judges overlapping patches of an image.

Legend: B batch, C channels.
"""

import torch
from torch import nn


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2 up to `num_layers`, then two of stride 1; one logit per receptive field.

    GroupNorm instead of BatchNorm: no statistics that differ between ranks, micro-batches or a resumed run.
    """

    def __init__(self, *, channels: int = 64, num_layers: int = 3, in_channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider, stride = min(channels * 2**index, channels * 8), 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Images -> logits (B, 1, h, w), positive for real."""
        return self.layers(pixels_BCHW)
