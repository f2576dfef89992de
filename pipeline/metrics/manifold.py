"""How two sets lie in each other's neighbourhoods.

A set's manifold is the union of balls around its samples, each reaching to the sample's k-th nearest
neighbour in the same set. With real x, generated y, balls B:

    precision = share of y inside any B(x)            recall = share of x inside any B(y)
    density   = mean over y of |{x: y in B(x)}| / k   coverage = share of x with any y in B(x)

Precision and recall: Kynkäänniemi et al. 2019, section 2. Density and coverage: Naeem et al. 2020,
section 3; unlike precision, one outlier's huge ball does not decide them. Density may exceed 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.metrics.checks import Array, checked_pair

_BLOCK = 2048


@dataclass(frozen=True)
class ManifoldFigures:
    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(real: Array, generated: Array, neighbours: int) -> ManifoldFigures:
    """The four figures of two sets `[n, d]`, `[m, d]` with k = `neighbours`.

    Distances are taken in blocks of 2,048 rows: memory grows with n + m, not with n × m.

    Raises:
        UserError: `neighbours` or fewer samples in a set, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated, neighbours + 1, f"{neighbours} neighbours of each sample")
    radius_x, radius_y = _radii(x, neighbours), _radii(y, neighbours)
    balls_around_y = torch.zeros(len(y), dtype=torch.int64, device=x.device)  # how many B(x) hold each y
    recalled, covered = [], []
    for start in range(0, len(x), _BLOCK):
        distance = _distances(x[start : start + _BLOCK], y)
        inside = distance < radius_x[start : start + _BLOCK, None]
        balls_around_y += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((distance < radius_y).any(dim=1))
    return ManifoldFigures(
        precision=(balls_around_y > 0).double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        density=balls_around_y.double().mean().item() / neighbours,
        coverage=torch.cat(covered).double().mean().item(),
    )


def nearest(queries: Array, references: Array) -> tuple[Tensor, Tensor]:
    """For each query `[n, d]` its nearest reference `[m, d]`: distances float64 `[n]`, indices int64 `[n]`."""
    x, y = checked_pair(references, queries)
    blocks = [_distances(block, x).min(dim=1) for block in y.split(_BLOCK)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each sample to its k-th nearest neighbour, itself not counted: `[n]`."""
    radii = []
    for start in range(0, len(x), _BLOCK):
        distance = _distances(x[start : start + _BLOCK], x)
        rows = torch.arange(len(distance), device=x.device)
        distance[rows, start + rows] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances `[len(a), len(b)]`."""
    squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * (a @ b.T)
    return squared.clamp_(min=0).sqrt_()
