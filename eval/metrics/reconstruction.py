"""Reconstruction quality: PSNR, SSIM, LPIPS and seams of uint8 images.

Shapes: B images, H height, W width, C = 3 channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.losses import PerceptualDistance
from um3.core.distributed import device
from um3.core.progress import Progress

WINDOW = 11  # Wang et al. 2004: gaussian window of 11 pixels, sigma 1.5, k1 = 0.01, k2 = 0.03
SIGMA = 1.5
PEAK = 255.0
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
BATCH = 16
MAX_PSNR = 100.0  # identical images have no finite PSNR; one wrong value in a 256-pixel image gives 101 dB
MAX_SEAMS = 100.0
# The settings that two values must share to be comparable, besides the images.
COMMON = {"compared_as": "uint8, RGB", "mean_over": "images"}
PSNR_PROTOCOL = COMMON | {"peak": PEAK, "most_db": MAX_PSNR}
SSIM_PROTOCOL = COMMON | {"window": WINDOW, "sigma": SIGMA, "c1": C1, "c2": C2, "border": "whole windows only"}
LPIPS_PROTOCOL = COMMON | {"range": "-1 to 1"}


def psnr(images_BHWC: NDArray | Tensor, *, originals_BHWC: NDArray | Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image in dB, float64 (B,), at most MAX_PSNR; ValueError as in `_pair`."""
    images, originals = _pair(images_BHWC, originals_BHWC)
    error_B = (images - originals).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(PEAK**2 / error_B)).clamp(max=MAX_PSNR)


def ssim(images_BHWC: NDArray | Tensor, *, originals_BHWC: NDArray | Tensor) -> Tensor:
    """Structural similarity of every image, float64 (B,): mean over the valid windows and the channels.

    ValueError as in `_pair`, or if a side is shorter than the window of 11.
    """
    images, originals = _pair(images_BHWC, originals_BHWC)
    if min(images.shape[1:3]) < WINDOW:
        height, width = images.shape[1:3]
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {height} x {width}")
    x, y = images.permute(0, 3, 1, 2), originals.permute(0, 3, 1, 2)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def seams(images_NHWC: NDArray, *, originals_NHWC: NDArray, patch_size: int) -> float:
    """How many times as much the error jumps between neighbouring pixels of two patches as within a patch.

    1 without seams; mean over images, channels and both directions, at most MAX_SEAMS. 1 for equal images.
    """
    sums_2, counts_2 = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)  # between, within
    for start in range(0, len(images_NHWC), BATCH):
        part = slice(start, start + BATCH)
        images, originals = _pair(images_NHWC[part], originals_NHWC[part])
        error = images - originals
        for jumps in (error.diff(dim=1).transpose(1, 2), error.diff(dim=2)):
            is_seam = torch.arange(1, jumps.shape[2] + 1) % patch_size == 0
            for index, chosen in enumerate((is_seam, ~is_seam)):
                sums_2[index] += jumps[:, :, chosen].abs().sum()
                counts_2[index] += jumps[:, :, chosen].numel()
    between, within = sums_2 / counts_2
    ratio = float(between / within)
    return min(ratio, MAX_SEAMS) if ratio > 0 else 1.0  # not a number if the images are equal


class Quality(NamedTuple):
    """PSNR and SSIM of every image, and their mean LPIPS; None without its network."""

    psnr: list[float]
    ssim: list[float]
    lpips: float | None


def quality(
    images_NHWC: NDArray, *, originals_NHWC: NDArray, distance: PerceptualDistance | None = None, label: str = "compare"
) -> Quality:
    """PSNR and SSIM of every image, and the mean LPIPS if `distance` is given."""
    result, lpips, progress = Quality([], [], None), 0.0, Progress(len(images_NHWC), label=label)
    for start in range(0, len(images_NHWC), BATCH):
        images_BHWC = torch.as_tensor(images_NHWC[start : start + BATCH]).to(device())
        originals_BHWC = torch.as_tensor(originals_NHWC[start : start + BATCH]).to(device())
        result.psnr.extend(psnr(images_BHWC, originals_BHWC=originals_BHWC).tolist())
        result.ssim.extend(ssim(images_BHWC, originals_BHWC=originals_BHWC).tolist())
        if distance:
            pair = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1 for pixels in (images_BHWC, originals_BHWC))
            with torch.inference_mode():
                lpips += float(distance(*pair)) * len(images_BHWC)
        progress.advance(len(images_BHWC))
    return result._replace(lpips=lpips / len(images_NHWC) if distance else None)


def _pair(images: NDArray | Tensor, originals: NDArray | Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64; ValueError unless both are uint8 (B, H, W, 3) of one shape."""
    first, second = torch.as_tensor(images), torch.as_tensor(originals)
    if first.dtype != torch.uint8 or second.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {first.dtype} and {second.dtype}")
    if first.shape != second.shape or first.ndim != 4 or first.shape[-1] != 3:
        raise ValueError(f"images must be two batches (B, H, W, 3), got {tuple(first.shape)} and {tuple(second.shape)}")
    return first.double(), second.double()


def _blur(x_BCHW: Tensor) -> Tensor:
    """Gaussian mean over every window that lies inside the image."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x_BCHW.device) - WINDOW // 2
    weights, channels = torch.exp(-(offsets**2) / (2 * SIGMA**2)), x_BCHW.shape[1]
    kernel = (weights / weights.sum()).expand(channels, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(x_BCHW, kernel.mT, groups=channels), kernel, groups=channels)
