"""Fréchet distance between two sets of features (Heusel et al. 2017, section 3, eq. 6).

    d² = |μ₁ − μ₂|² + Tr Σ₁ + Tr Σ₂ − 2 Tr (Σ₁ Σ₂)^½

with means μ and covariances Σ (divisor n − 1) of the two sets. It is FID only on the features of
the one Inception network that published figures use; on others it is named after the extractor.
The estimate falls as the number of samples grows: compare at equal n only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.metrics.checks import Array, checked_pair


def frechet_distance(real: Array, generated: Array) -> float:
    """d² of two sets `[n, d]` and `[m, d]`.

    With fewer samples than dimensions it goes through the n × m Gram matrix of centred samples,
    whose singular values carry the same trace: exact for singular covariances, and much faster.

    Raises:
        UserError: fewer than 2 samples, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated, at_least=2, reason="a covariance")
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance_of_moments(*moments(x), *moments(y))
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    # Scaled so that Σ₁ = XᵀX and Σ₂ = YᵀY; then (Σ₁Σ₂)^½ has the trace of the singular values of XYᵀ.
    x = (x - mean_x) / (len(x) - 1) ** 0.5
    y = (y - mean_y) / (len(y) - 1) ** 0.5
    trace_of_root = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and covariance `[d, d]` of float64 features `[n, d]`."""
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance_of_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """d² of two Gaussians given by float64 means `[d]` and covariances `[d, d]`.

    Σ₁Σ₂ is not symmetric, but shares its eigenvalues with Σ₁^½ Σ₂ Σ₁^½, which is: so two symmetric
    eigenproblems replace the general matrix square root, and no imaginary part can appear.
    """
    values, vectors = torch.linalg.eigh(cov_x)
    root_x = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Rounding makes zero eigenvalues slightly negative when a covariance is singular.
    trace_of_root = torch.linalg.eigvalsh(root_x @ cov_y @ root_x).clamp(min=0).sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)
