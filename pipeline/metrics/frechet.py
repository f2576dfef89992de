"""Fréchet distance between two sets of features (Heusel et al. 2017, section 3, eq. 6), and its limit for many samples.

    d² = |μ₁ − μ₂|² + Tr Σ₁ + Tr Σ₂ − 2 Tr (Σ₁ Σ₂)^½

with means μ and covariances Σ (divisor n − 1) of the two sets. It is FID only on the features of
the one Inception network that published metrics use; on others it is named after the extractor.
The estimate falls as the number of samples grows: compare at equal n only, or use `frechet_infinity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.metrics.checks import BLOCK, Array, checked_pair

_TOLERANCE = 1e-5  # relative


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian by its mean `[d]`, a root of its covariance (any R `[d, r]` with R Rᵀ = Σ) and its trace. Float64."""

    mean: Tensor
    root: Tensor
    trace: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Gaussian:
        """The Gaussian of samples `[n, d]`. With n ≤ d, the centred samples themselves are a root."""
        if len(x) <= x.shape[1]:
            x = x.double()
            mean = x.mean(dim=0)
            root = ((x - mean) / (len(x) - 1) ** 0.5).T
            return cls(mean, root, root.square().sum())
        return cls.of_moments(*moments(x))

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """The Gaussian of this mean `[d]` and covariance `[d, d]`."""
        # Cholesky's root costs a fraction of the symmetric one, but a singular covariance may have none.
        root, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors * values.clamp(min=0).sqrt()  # rounding makes zero eigenvalues slightly negative
        return cls(mean, root, covariance.trace())

    def distance(self, other: Gaussian) -> float:
        """d² to another Gaussian.

        Σ₁Σ₂ = R₁R₁ᵀR₂R₂ᵀ has the nonzero eigenvalues of MᵀM with M = R₁ᵀR₂: the trace of its root is the sum of M's
        singular values. MᵀM is symmetric and never indefinite, so no imaginary part can appear.
        """
        m = self.root.T @ other.root
        apart = (self.mean - other.mean).square().sum() + self.trace + other.trace
        if m.shape[0] == m.shape[1]:
            values = torch.linalg.eigvalsh(m.T @ m).clamp(min=0)  # five times as fast as svdvals
            distance = float(apart - 2 * values.sqrt().sum())
            if 2 * _lost_by_squaring(values) <= _TOLERANCE * distance:
                return distance
        return max(float(apart - 2 * torch.linalg.svdvals(m).sum()), 0.0)


def _lost_by_squaring(values: Tensor) -> float:
    """How far Σ √λ may be off, over eigenvalues λ of MᵀM, each of which is off by a rounding of the largest.

    It counts where M has lost rank: every √λ that should be 0 is then up to 1e-8 of the largest, thousands of times
    and always upwards. The others are off to either side, and less.
    """
    noise = 4 * torch.finfo(values.dtype).eps * values.max()
    lost = values < noise
    others = (noise / (2 * values[~lost].sqrt())).norm()
    return float(lost.sum() * noise.sqrt() + 3 * others)


def frechet_distance(real: Array, generated: Array, reference: Gaussian | None = None) -> float:
    """d² of two sets `[n, d]` and `[m, d]`. `reference`: the Gaussian of `real`, where it is known already.

    Raises:
        UserError: fewer than 2 samples, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated, at_least=2, reason="a covariance")
    return (reference or Gaussian.of(x)).distance(Gaussian.of(y))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and covariance `[d, d]` of features `[n, d]`, in float64 and a block of rows at a time."""
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in torch.split(features, BLOCK):
        mean += block.double().sum(dim=0)
    mean /= len(features)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for block in torch.split(features, BLOCK):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    return mean, covariance.div_(len(features) - 1)


def frechet_distance_of_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """d² of two Gaussians given by float64 means `[d]` and covariances `[d, d]`."""
    return Gaussian.of_moments(mean_x, cov_x).distance(Gaussian.of_moments(mean_y, cov_y))


def frechet_infinity(
    real: Array,
    generated: Array,
    generator: torch.Generator,
    points: int = 15,
    reference: Gaussian | None = None,
) -> float:
    """FD∞, what d² tends to for infinitely many generated samples (Chong & Forsyth 2020, section 3).

    d² of N samples is, to first order, a straight line in 1/N: it is measured for `points` sizes N, from a tenth of
    the samples to all of them, each a random subset, against all real samples; FD∞ is the line's value at 1/N = 0.
    The bias that the number of *real* samples brings stays. Slightly below zero is possible.

    Raises:
        UserError: fewer than 20 generated samples, and what `frechet_distance` raises.
    """
    x, y = checked_pair(real, generated, at_least=2, reason="a covariance")
    if len(y) < 20:
        raise UserError(f"FD∞: expected at least 20 generated samples, found {len(y)}; add images")
    reference = reference or Gaussian.of(x)
    sizes = torch.linspace(len(y) / 10, len(y), points).round().long().tolist()
    distances = []
    for size in sizes:
        chosen = torch.randperm(len(y), generator=generator)[:size].to(y.device)
        distances.append(reference.distance(Gaussian.of(y[chosen])))
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    line = torch.linalg.lstsq(
        torch.stack([inverse, torch.ones_like(inverse)], dim=1), torch.tensor(distances, dtype=torch.float64)[:, None]
    ).solution
    return float(line[1])


def frechet_deviation(
    real: Array, generated: Array, generator: torch.Generator, resamples: int, paired: bool = False
) -> float:
    """Standard deviation of d² under the bootstrap: both sets drawn anew with replacement, `resamples` times.

    `paired`: sample i of one set belongs to sample i of the other (reconstructions), so pairs are drawn.
    Its spread is that of d² at this n. Its mean is not: a resample repeats samples, which lifts d², so percentiles
    of the bootstrap would miss the metric itself; hence a deviation, to be put around the metric. Where
    hardly anything but the bias is left (d² near that of two halves of one set) it is too wide, not too narrow.
    """
    x, y = checked_pair(real, generated, at_least=2, reason="a covariance")

    def rows(values: Tensor) -> Tensor:
        return torch.randint(len(values), (len(values),), generator=generator).to(values.device)

    distances = []
    for _ in range(resamples):
        of_x = rows(x)
        of_y = of_x if paired else rows(y)
        distances.append(Gaussian.of(x[of_x]).distance(Gaussian.of(y[of_y])))
    return torch.tensor(distances, dtype=torch.float64).std().item()
