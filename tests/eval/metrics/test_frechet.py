"""The Frechet distance against scipy and by hand, and its moments over batches."""

import numpy as np
import pytest
import torch
from scipy import linalg

from eval.metrics.frechet import StreamingMoments, frechet_distance


def features(*, count, dims, seed, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return torch.randn(count, dims, generator=generator, dtype=torch.float64) @ mix * scale + offset


def moments(*batches):
    streaming = StreamingMoments(batches[0].shape[1])
    for batch in batches:
        streaming.add(batch)
    return streaming.result()


def scipy_distance(first, second):
    """The formula as published, with a general matrix square root."""
    mean_1, mean_2 = first.mean(0), second.mean(0)
    cov_1, cov_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(cov_1 @ cov_2)
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root.real)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_general_matrix_root(seed):
    first = features(count=200, dims=16, seed=seed)
    second = features(count=150, dims=16, seed=seed + 10, scale=1.5, offset=0.3)
    expected = scipy_distance(first.numpy(), second.numpy())
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-8)


def test_zero_with_itself_and_symmetric_and_rank_deficient():
    few = features(count=5, dims=32, seed=1)
    other = features(count=6, dims=32, seed=2)
    assert frechet_distance(moments(few), moments(few)) == pytest.approx(0, abs=1e-6)
    forward, back = frechet_distance(moments(few), moments(other)), frechet_distance(moments(other), moments(few))
    assert forward == pytest.approx(back, rel=1e-6) and forward > 0


def test_batches_do_not_change_the_moments_even_far_from_zero():
    points = features(count=101, dims=8, seed=3, offset=1e6)
    result = moments(points[:1], points[1:40], points[40:99], points[99:], points[:0])
    assert result.num_vectors == 101
    np.testing.assert_allclose(result.covariance, np.cov(points.numpy(), rowvar=False), rtol=1e-6)


def test_single_and_infinite_vectors_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        moments(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.full((3, 4), float("nan")))
