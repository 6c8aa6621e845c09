"""Frechet distance between two sets of feature vectors, each modelled as a Gaussian (Heusel et al. 2017).

It is called FID only over the features of the Inception network that defines it. The estimate is biased upwards by
about 1/n: compare distances only over equal numbers of images, and distrust those over fewer images than dimensions.

Shapes: N vectors, D dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """The size, mean (D,) and unbiased covariance (D, D) of a set of vectors, in float64."""

    num_vectors: int
    mean: Tensor
    covariance: Tensor


class StreamingMoments:
    """Mean and covariance of vectors that arrive in batches; the batch sizes do not change the result.

    Batches are merged around their own means (Chan et al. 1983). Raw sums of squares would lose digits if the mean is
    large compared with the spread.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean_D = torch.zeros(num_features, dtype=torch.float64)
        self.scatter_DD = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features_ND: Tensor) -> None:
        """Add a batch of vectors. Raises ValueError: a vector is not finite."""
        features_ND = features_ND.detach().to("cpu", torch.float64)
        if not torch.isfinite(features_ND).all():
            raise ValueError("a feature vector is not finite; check for a broken image or a diverged model")
        if len(features_ND) == 0:
            return
        batch_mean_D, total = features_ND.mean(dim=0), self.count + len(features_ND)
        centred_ND, shift_D = features_ND - batch_mean_D, batch_mean_D - self.mean_D
        self.scatter_DD += centred_ND.T @ centred_ND
        self.scatter_DD += torch.outer(shift_D, shift_D) * (self.count * len(features_ND) / total)
        self.mean_D += shift_D * (len(features_ND) / total)
        self.count = total

    def result(self) -> Moments:
        """The moments of all batches. Raises ValueError: fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        return Moments(self.count, self.mean_D.clone(), self.scatter_DD / (self.count - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least zero.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of R C2 R with R = C1^(1/2). That matrix is symmetric,
    so `eigh` applies: 4 s at D = 2048 instead of 25 s for a general matrix root, and a rank-deficient C needs no
    added epsilon.
    """
    values_D, vectors_DD = torch.linalg.eigh(first.covariance)
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    product_DD = root_DD @ second.covariance @ root_DD
    overlap = torch.linalg.eigvalsh((product_DD + product_DD.T) / 2).clamp(min=0).sqrt().sum()
    offset = (first.mean - second.mean).square().sum()
    distance = offset + first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(float(distance), 0.0)
