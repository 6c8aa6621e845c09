"""PSNR and SSIM against torchmetrics, which implements them independently, and seams by hand."""

import numpy as np
import pytest
import torch

from eval.metrics.reconstruction import MAX_PSNR, MAX_SEAMS, SIGMA, WINDOW, psnr, seams, ssim


def image_pairs(*, count=3, height=16, width=20, noise=12, seed=0):
    generator = np.random.default_rng(seed)
    originals = generator.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    noisy = originals.astype(int) + generator.integers(-noise, noise + 1, originals.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), originals


@pytest.mark.parametrize("noise", [2, 60])
def test_psnr_and_ssim_are_those_of_torchmetrics(noise):
    library = pytest.importorskip("torchmetrics.functional.image")
    images, originals = image_pairs(noise=noise)
    pair = [torch.tensor(batch).permute(0, 3, 1, 2).double() for batch in (images, originals)]
    expected = library.peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(images, originals_BHWC=originals), expected)
    options = {"data_range": 255.0, "sigma": SIGMA, "reduction": "none", "return_full_image": True}
    _, maps_NCHW = library.structural_similarity_index_measure(*pair, **options)
    # torchmetrics also counts the windows that reach over the edge; ours are those within the image.
    edge = WINDOW // 2
    expected = maps_NCHW[..., edge:-edge, edge:-edge].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(images, originals_BHWC=originals), expected, rtol=1e-6, atol=0)


def test_an_identical_image_has_the_highest_values():
    images, _ = image_pairs()
    assert psnr(images, originals_BHWC=images).tolist() == [MAX_PSNR] * 3
    np.testing.assert_allclose(ssim(images, originals_BHWC=images).numpy(), 1, rtol=1e-12)


def test_values_are_per_image_and_symmetric():
    images, originals = image_pairs(count=4)
    for measure in (psnr, ssim):
        whole = measure(images, originals_BHWC=originals)
        single = [float(measure(images[i : i + 1], originals_BHWC=originals[i : i + 1])) for i in range(4)]
        np.testing.assert_allclose(whole.numpy(), single, rtol=1e-12)
        np.testing.assert_allclose(whole.numpy(), measure(originals, originals_BHWC=images).numpy(), rtol=1e-9)


def test_seams_compare_the_jumps_of_the_error_at_the_borders_of_patches():
    noisy, originals = image_pairs(count=8, height=32, width=32)
    assert seams(noisy, originals_NHWC=originals, patch_size=8) == pytest.approx(1, abs=0.05)
    assert seams(originals, originals_NHWC=originals, patch_size=8) == 1
    plain = np.full((1, 4, 4, 3), 100, np.uint8)
    rebuilt = plain.copy()
    rebuilt[:, :, 2:] += 6  # between columns: 0, 6, 0; between rows: none
    rebuilt[:, 0, 0] += 2  # one jump of 2 in each direction within a patch
    between, within = (6 / 1 + 0) / 2, (2 / 8 + 2 / 8) / 2
    assert seams(rebuilt, originals_NHWC=plain, patch_size=2) == pytest.approx(between / within)
    rebuilt[:, 0, 0] -= 2
    assert seams(rebuilt, originals_NHWC=plain, patch_size=2) == MAX_SEAMS
    with pytest.raises(ValueError, match="uint8"):
        seams(noisy / 255, originals_NHWC=originals, patch_size=8)


def test_small_float_and_unequal_images_are_refused():
    images, originals = image_pairs(height=10)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 20"):
        ssim(images, originals_BHWC=originals)
    with pytest.raises(ValueError, match="uint8"):
        psnr(images / 255, originals_BHWC=originals)
    with pytest.raises(ValueError, match="two batches"):
        psnr(images[:2], originals_BHWC=originals)
