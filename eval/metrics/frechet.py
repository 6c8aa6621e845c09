"""Frechet distance between two sets of feature vectors, each summed up as a Gaussian (Heusel et al. 2017).

It is called FID only over the features of the Inception network it was defined with. The estimate is biased upwards by
about 1/n, so compare only distances over equal numbers of images, and distrust one over fewer images than dimensions.

Shapes: N vectors, D dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a Frechet distance needs to know of a set: its size, mean (D,) and unbiased covariance (D, D) in float64."""

    num_vectors: int
    mean: Tensor
    covariance: Tensor


class StreamingMoments:
    """Mean and covariance of vectors that arrive in batches; the split into batches does not change the result.

    Batches are merged around their own means (Chan et al. 1983): raw sums of squares lose digits when the mean is
    large against the spread.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean_D = torch.zeros(num_features, dtype=torch.float64)
        self.scatter_DD = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features_ND: Tensor) -> None:
        """Count a batch of vectors.

        Raises:
            ValueError: a vector that is not finite.
        """
        features_ND = features_ND.detach().to("cpu", torch.float64)
        if not torch.isfinite(features_ND).all():
            raise ValueError("a feature vector is not finite; look for a broken image or a diverged model")
        added = len(features_ND)
        if added == 0:
            return
        batch_mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - batch_mean_D
        shift_D = batch_mean_D - self.mean_D
        total = self.count + added
        self.scatter_DD += centred_ND.T @ centred_ND
        self.scatter_DD += torch.outer(shift_D, shift_D) * (self.count * added / total)
        self.mean_D += shift_D * (added / total)
        self.count = total

    def result(self) -> Moments:
        """The moments so far.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        return Moments(self.count, self.mean_D.clone(), self.scatter_DD / (self.count - 1))


def moments(features_ND: Tensor) -> Moments:
    """Moments of all vectors at once."""
    streaming = StreamingMoments(features_ND.shape[1])
    streaming.add(features_ND)
    return streaming.result()


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), never below zero.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of R C2 R with R = C1^(1/2): symmetric, so `eigh`
    applies (4 s at D = 2048, where a general matrix root takes 25 s) and a rank-deficient C needs no added epsilon.
    """
    values_D, vectors_DD = torch.linalg.eigh(first.covariance)
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    product_DD = root_DD @ second.covariance @ root_DD
    overlap = torch.linalg.eigvalsh((product_DD + product_DD.T) / 2).clamp(min=0).sqrt().sum()
    offset = (first.mean - second.mean).square().sum()
    distance = offset + first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(float(distance), 0.0)
