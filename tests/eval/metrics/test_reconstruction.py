"""PSNR, SSIM and seams by hand and against their formulas."""

import numpy as np
import pytest

from eval.metrics.reconstruction import MAX_PSNR, MAX_SEAMS, psnr, seams, ssim


def image_pairs(*, count=3, height=16, width=20, noise=12, seed=0):
    generator = np.random.default_rng(seed)
    originals = generator.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    noisy = originals.astype(int) + generator.integers(-noise, noise + 1, originals.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), originals


def test_psnr_by_hand():
    originals = np.zeros((2, 4, 4, 3), np.uint8)
    images = originals.copy()
    images[0] += 5
    images[1, 0, 0, 0] = 48
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 / (48**2 / 48))]
    np.testing.assert_allclose(psnr(images, originals_BHWC=originals).numpy(), expected, rtol=1e-12)


def test_an_identical_image_has_the_highest_values():
    images, _ = image_pairs()
    assert psnr(images, originals_BHWC=images).tolist() == [MAX_PSNR] * 3
    np.testing.assert_allclose(ssim(images, originals_BHWC=images).numpy(), 1, rtol=1e-12)


def slow_ssim(x, y):
    """Wang et al. 2004, straight from the formula, over all windows at once."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(image.astype(float), (11, 11), axis=(0, 1)) for image in (x, y))

    def mean(values):
        return (weights * values).sum(axis=(-2, -1), keepdims=True)

    var_a, var_b, cov = (mean((p - mean(p)) * (q - mean(q))) for p, q in ((a, a), (b, b), (a, b)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
    return np.mean(luminance * (2 * cov + c2) / (var_a + var_b + c2))


def test_ssim_equals_the_formula_window_by_window():
    images, originals = image_pairs(noise=60)
    expected = [slow_ssim(a, b) for a, b in zip(images, originals, strict=True)]
    np.testing.assert_allclose(ssim(images, originals_BHWC=originals).numpy(), expected, rtol=1e-9)


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
