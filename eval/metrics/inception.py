"""The Inception network that defines the FID, and the three common ways to resize images for it, in plain torch.

It is Inception v3 as TensorFlow published it in 2015, not torchvision's: 1,008 classes, average pools that ignore the
padding, and a max pool in the last block. The module names are those of the published file
`pt_inception-2015-12-05-6726825d.pth` (566 tensors), so its state dict loads directly. torchvision is not a dependency
because its wheels break a CPU-only torch.

FID programs differ in how they resize images to 299 x 299 pixels. Single features differ by some percent, so the
resizing is part of a score's name:

    pytorch-fid       bilinear between pixel centres, not antialiased
    torch-fidelity    TensorFlow 1's bilinear between pixel corners, not antialiased, as in the original program
    clean-fid         Pillow's antialiased bicubic on floats (Parmar et al. 2022), used for LlamaGen's COCO numbers

Shapes: B images, C channels, H height, W width.
"""

import functools
from collections.abc import Callable
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
    """Uint8 images (B, H, W, 3) -> the network's input: float32 (B, 3, 299, 299) in about -1 to 1."""
    if preprocessing == "clean-fid":
        return (torch.from_numpy(np.stack([_resize_antialiased(image) for image in images_BHWC])) - 128) / 128
    pixels_BCHW = torch.as_tensor(images_BHWC).permute(0, 3, 1, 2).float()
    if preprocessing == "torch-fidelity":
        for dim in (3, 2):
            pixels_BCHW = _resize_between_corners(pixels_BCHW, dim=dim)
        return (pixels_BCHW - 128) / 128
    return F.interpolate(pixels_BCHW / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1


def _resize_between_corners(pixels_BCHW: Tensor, *, dim: int) -> Tensor:
    length = pixels_BCHW.shape[dim]
    positions = torch.arange(SIDE, dtype=torch.float32) * (length / SIDE)
    lower = positions.long()
    weights = (positions - lower).view(-1, *[1] * (3 - dim))
    before = pixels_BCHW.index_select(dim, lower)
    after = pixels_BCHW.index_select(dim, (lower + 1).clamp(max=length - 1))
    return before + (after - before) * weights


def _resize_antialiased(image_HWC: NDArray) -> NDArray:
    channels = [Image.fromarray(image_HWC[..., channel].astype(np.float32), mode="F") for channel in range(3)]
    resized = [channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. Without a stride the output has the size of the input."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int = 1, pad: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


Pool = Callable[[Tensor], Tensor]
Layer = tuple[str, int, tuple[int, int], int]
"""A convolution: its name in the published file, output channels, kernel size, stride."""
Branch = list[Pool | Layer]


class Block(nn.Module):
    """Branches that read the same input; their outputs are concatenated. A layer in two branches is shared by them."""

    def __init__(self, inputs: int, *branches: Branch):
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = inputs
            for name, outputs, kernel, stride in (step for step in branch if not callable(step)):
                if name not in self._modules:
                    self.add_module(name, Conv(channels, outputs, kernel, stride=stride))
                channels = outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs, by_layer = [], dict[str, Tensor]()
        for branch in self.branches:
            y_BCHW = x_BCHW
            for step in branch:
                if callable(step):
                    y_BCHW = step(y_BCHW)
                else:
                    name = step[0]
                    by_layer[name] = y_BCHW = by_layer[name] if name in by_layer else self.get_submodule(name)(y_BCHW)
            outputs.append(y_BCHW)
        return torch.cat(outputs, dim=1)


_average: Pool = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve: Pool = functools.partial(F.max_pool2d, kernel_size=3, stride=2)
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _chain(prefix: str, *layers: tuple[int, tuple[int, int]], stride: int = 1) -> Branch:
    """Layers PREFIX_1, PREFIX_2, ... (PREFIX if it is one) from (outputs, kernel); `stride` is the last one's."""
    names = [f"{prefix}_{number}" for number in range(1, len(layers) + 1)] if len(layers) > 1 else [prefix]
    strides = [1] * (len(layers) - 1) + [stride]
    return [(name, *layer, stride) for name, layer, stride in zip(names, layers, strides, strict=True)]


def _block_a(inputs: int, *, pool: int) -> Block:
    """35 x 35 grid."""
    return Block(
        inputs,
        _chain("branch1x1", (64, ONE)),
        _chain("branch5x5", (48, ONE), (64, FIVE)),
        _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        [_average, *_chain("branch_pool", (pool, ONE))],
    )


def _block_c(inputs: int, *, width: int) -> Block:
    """17 x 17 grid; 7 x 7 convolutions are split into rows and columns."""
    return Block(
        inputs,
        _chain("branch1x1", (192, ONE)),
        _chain("branch7x7", (width, ONE), (width, ROW), (192, COLUMN)),
        _chain("branch7x7dbl", (width, ONE), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)),
        [_average, *_chain("branch_pool", (192, ONE))],
    )


def _block_e(inputs: int, *, pool: Pool) -> Block:
    """8 x 8 grid; two branches end in a row and a column. The last block of the 2015 graph has a max pool."""
    branches = [_chain("branch1x1", (320, ONE))]
    chains = _chain("branch3x3_1", (384, ONE)), _chain("branch3x3dbl", (448, ONE), (384, THREE))
    for chain, name in zip(chains, ("branch3x3_2", "branch3x3dbl_3"), strict=True):
        branches += [[*chain, (f"{name}a", 384, (1, 3), 1)], [*chain, (f"{name}b", 384, (3, 1), 1)]]
    return Block(inputs, *branches, [pool, *_chain("branch_pool", (192, ONE))])


class Inception2015(nn.Module):
    """Images from `prepare` (B, 3, 299, 299) -> pooled features (B, 2048)."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": Conv(3, 32, THREE, stride=2),
            "Conv2d_2a_3x3": Conv(32, 32, THREE, pad=False),
            "Conv2d_2b_3x3": Conv(32, 64, THREE),
            "pool_1": nn.MaxPool2d(3, stride=2),
            "Conv2d_3b_1x1": Conv(64, 80, ONE),
            "Conv2d_4a_3x3": Conv(80, 192, THREE, pad=False),
            "pool_2": nn.MaxPool2d(3, stride=2),
            "Mixed_5b": _block_a(192, pool=32),
            "Mixed_5c": _block_a(256, pool=64),
            "Mixed_5d": _block_a(288, pool=64),
            "Mixed_6a": Block(  # 35 x 35 -> 17 x 17
                288,
                _chain("branch3x3", (384, THREE), stride=2),
                _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), stride=2),
                [_halve],
            ),
            **{
                f"Mixed_6{name}": _block_c(768, width=width)
                for name, width in zip("bcde", (128, 160, 160, 192), strict=True)
            },
            "Mixed_7a": Block(  # 17 x 17 -> 8 x 8
                768,
                _chain("branch3x3", (192, ONE), (320, THREE), stride=2),
                _chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, THREE), stride=2),
                [_halve],
            ),
            "Mixed_7b": _block_e(1280, pool=_average),
            "Mixed_7c": _block_e(2048, pool=_maximum),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in list(self.children())[:-1]:  # all but `fc`
            x_BCHW = layer(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))
