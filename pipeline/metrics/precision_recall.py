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

from pipeline.metrics.checks import BLOCK, Array, checked_pair


@dataclass(frozen=True)
class ManifoldMetrics:
    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Membership:
    """What the four metrics are the means of: a value a sample, float64."""

    precision: Tensor  # [m], 0 or 1
    recall: Tensor  # [n], 0 or 1
    density: Tensor  # [m], at least 0
    coverage: Tensor  # [n], 0 or 1


def precision_recall_density_coverage(real: Array, generated: Array, neighbours: int) -> ManifoldMetrics:
    """The four metrics of two sets `[n, d]`, `[m, d]` with k = `neighbours`. Raises as `membership` does."""
    values = membership(real, generated, neighbours)
    return ManifoldMetrics(**{name: value.mean().item() for name, value in vars(values).items()})


def membership(real: Array, generated: Array, neighbours: int) -> Membership:
    """Which samples of `[n, d]` and `[m, d]` lie in the other set's manifold.

    Distances are taken in float64 in blocks of 2,048 × 2,048: beside the features, memory grows with n + m.

    Raises:
        UserError: `neighbours` or fewer samples in a set, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated, neighbours + 1, f"{neighbours} neighbours of each sample")
    radius_x, radius_y = _radii(x, neighbours), _radii(y, neighbours)
    balls_around_y = torch.zeros(len(y), dtype=torch.int64, device=x.device)  # how many B(x) hold each y
    recalled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for rows in _blocks(len(x)):
        block = x[rows].double()
        for columns in _blocks(len(y)):
            distance = _distances(block, y[columns].double())
            inside = distance < radius_x[rows, None]
            balls_around_y[columns] += inside.sum(dim=0)
            covered[rows] |= inside.any(dim=1)
            recalled[rows] |= (distance < radius_y[columns]).any(dim=1)
    return Membership(
        precision=(balls_around_y > 0).double(),
        recall=recalled.double(),
        density=balls_around_y.double() / neighbours,
        coverage=covered.double(),
    )


def nearest(queries: Array, references: Array) -> tuple[Tensor, Tensor]:
    """For each query `[n, d]` its nearest reference `[m, d]`: distances float64 `[n]`, indices int64 `[n]`."""
    x, y = checked_pair(references, queries)
    best = torch.full((len(y),), torch.inf, dtype=torch.float64, device=y.device)
    index = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    for rows in _blocks(len(y)):
        block = y[rows].double()
        for columns in _blocks(len(x)):
            found = _distances(block, x[columns].double()).min(dim=1)
            closer = found.values < best[rows]
            best[rows] = torch.where(closer, found.values, best[rows])
            index[rows] = torch.where(closer, found.indices + columns.start, index[rows])
    return best, index


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each sample to its k-th nearest neighbour, itself not counted: `[n]`."""
    smallest = torch.full((len(x), neighbours), torch.inf, dtype=torch.float64, device=x.device)
    blocks = _blocks(len(x))
    for i, rows in enumerate(blocks):
        block = x[rows].double()
        for columns in blocks[i:]:  # a distance is that of both its ends
            distance = _distances(block, x[columns].double())
            if columns == rows:
                distance.fill_diagonal_(torch.inf)
            else:
                smallest[columns] = _k_smallest(smallest[columns], distance.T)
            smallest[rows] = _k_smallest(smallest[rows], distance)
    return smallest.max(dim=1).values


def _k_smallest(known: Tensor, more: Tensor) -> Tensor:
    """Of each row of both, as many as are `known`."""
    k = known.shape[1]
    found = more.topk(min(k, more.shape[1]), dim=1, largest=False).values
    return torch.cat([known, found], dim=1).topk(k, dim=1, largest=False).values


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances `[len(a), len(b)]`."""
    squared = torch.addmm(a.square().sum(dim=1)[:, None] + b.square().sum(dim=1), a, b.T, alpha=-2)
    return squared.clamp_(min=0).sqrt_()
