"""The Inception network that FID is defined with, and the ways in which images are brought to it, in plain torch: no
torchvision (which breaks CPU-only torch).

It is Inception v3 as TensorFlow published it in 2015, not torchvision's: 1,008 classes, average pools that leave out
the padding, and a max pool in the last block. Module names follow the published
`pt_inception-2015-12-05-6726825d.pth` (566 tensors), so its state dict loads as it is.

Its papers do not say how images come to 299 x 299 pixels, and the programs that compute FID differ in it. Single
features differ by some percent, so the way is part of a score's name:

    pytorch-fid       bilinear between pixel centres, not antialiased
    torch-fidelity    TensorFlow 1's bilinear between pixel corners, not antialiased: the original program's
    clean-fid         Pillow's antialiased bicubic on floats (Parmar et al. 2022), what LlamaGen's COCO numbers use

Shapes: B images, C channels, H height, W width.
"""

from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eval.config import Preprocessing

SIDE = 299
PREPROCESSINGS: tuple[Preprocessing, ...] = get_args(Preprocessing)


def prepare(images_BHWC: NDArray, *, preprocessing: Preprocessing) -> Tensor:
    """Images uint8 (B, H, W, 3) -> what the network reads: float32 (B, 3, 299, 299), about -1 to 1."""
    if preprocessing == "clean-fid":
        return (torch.from_numpy(np.stack([_antialiased(image) for image in images_BHWC])) - 128) / 128
    pixels_BCHW = torch.as_tensor(images_BHWC).permute(0, 3, 1, 2).float()
    if preprocessing == "torch-fidelity":
        for dim in (3, 2):
            pixels_BCHW = _between_corners(pixels_BCHW, dim=dim)
        return (pixels_BCHW - 128) / 128
    return F.interpolate(pixels_BCHW / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1


def _between_corners(pixels_BCHW: Tensor, *, dim: int) -> Tensor:
    length = pixels_BCHW.shape[dim]
    places = torch.arange(SIDE, dtype=torch.float32) * (length / SIDE)
    lower = places.long()
    weights = (places - lower).view(-1, *[1] * (3 - dim))
    before = pixels_BCHW.index_select(dim, lower)
    behind = pixels_BCHW.index_select(dim, (lower + 1).clamp(max=length - 1))
    return before + (behind - before) * weights


def _antialiased(image_HWC: NDArray) -> NDArray:
    channels = [Image.fromarray(image_HWC[..., channel].astype(np.float32), mode="F") for channel in range(3)]
    resized = [channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


def _row(inputs: int, outputs: int, *, length: int) -> Conv:
    return Conv(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, *, length: int) -> Conv:
    return Conv(inputs, outputs, (length, 1), padding=(length // 2, 0))


def _average(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35 grid."""

    def __init__(self, inputs: int, *, pool: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17 grid, 7 x 7 convolutions cut into rows and columns."""

    def __init__(self, inputs: int, *, width: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, width, 1)
        self.branch7x7_2 = _row(width, width, length=7)
        self.branch7x7_3 = _column(width, 192, length=7)
        self.branch7x7dbl_1 = Conv(inputs, width, 1)
        self.branch7x7dbl_2 = _column(width, width, length=7)
        self.branch7x7dbl_3 = _row(width, width, length=7)
        self.branch7x7dbl_4 = _column(width, width, length=7)
        self.branch7x7dbl_5 = _row(width, 192, length=7)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, length=7)
        self.branch7x7x3_3 = _column(192, 192, length=7)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8 grid. `max_pool` marks the last block, whose pool the 2015 graph takes as a maximum."""

    def __init__(self, inputs: int, *, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, length=3)
        self.branch3x3_2b = _column(384, 384, length=3)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, length=3)
        self.branch3x3dbl_3b = _column(384, 384, length=3)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception2015(nn.Module):
    """Images as `prepare` makes them (B, 3, 299, 299) -> pooled features (B, 2048)."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels_BCHW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
