"""Precision, recall, density and coverage: how two sets lie in each other's neighbourhoods.

A set's manifold is the union of balls around its samples, each reaching to the sample's k-th nearest
neighbour in the same set. With real x, generated y, balls B:

    precision = share of y inside any B(x)            recall = share of x inside any B(y)
    density   = mean over y of |{x: y in B(x)}| / k   coverage = share of x with any y in B(x)

Precision and recall: Kynkäänniemi et al. 2019, section 2, eq. 1, where a ball's surface belongs to it (in the code of
density's and coverage's authors it does not); with k = 3 they are those of guided-diffusion's evaluator. Density and
coverage: Naeem et al. 2020, section 3; unlike precision, one outlier's huge ball does not decide them. Density may
exceed 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.metrics.checks import Array, checked_pair
from pipeline.metrics.neighbours import blocks, distances, kth_neighbour_distances


@dataclass(frozen=True)
class ManifoldMetrics:
    """The four metrics of two sets."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Membership:
    """The values that the four metrics are the means of, one per sample, float64."""

    precision: Tensor  # [m], 0 or 1
    recall: Tensor  # [n], 0 or 1
    density: Tensor  # [m], at least 0
    coverage: Tensor  # [n], 0 or 1


def precision_recall_density_coverage(real: Array, generated: Array, neighbours: int) -> ManifoldMetrics:
    """The four metrics of two sets `[n, d]`, `[m, d]` with k = `neighbours`. Raises as `membership` does."""
    values = membership(real, generated, neighbours)
    return ManifoldMetrics(
        precision=values.precision.mean().item(),
        recall=values.recall.mean().item(),
        density=values.density.mean().item(),
        coverage=values.coverage.mean().item(),
    )


def membership(real: Array, generated: Array, neighbours: int) -> Membership:
    """Which samples of `[n, d]` and `[m, d]` lie in the other set's manifold.

    Distances are taken in float64 in blocks of 2,048 × 2,048: beside the features, memory grows with n + m.

    Raises:
        UserError: `neighbours` or fewer samples in a set, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated, neighbours + 1, f"{neighbours} neighbours of each sample")
    radius_x, radius_y = kth_neighbour_distances(x, neighbours), kth_neighbour_distances(y, neighbours)
    balls_around_y = torch.zeros(len(y), dtype=torch.int64, device=x.device)  # how many B(x) hold each y
    precise = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    recalled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for rows in blocks(len(x)):
        block = x[rows].double()
        for columns in blocks(len(y)):
            distance = distances(block, y[columns].double())
            inside = distance < radius_x[rows, None]
            balls_around_y[columns] += inside.sum(dim=0)
            covered[rows] |= inside.any(dim=1)
            precise[columns] |= (distance <= radius_x[rows, None]).any(dim=0)
            recalled[rows] |= (distance <= radius_y[columns]).any(dim=1)
    return Membership(
        precision=precise.double(),
        recall=recalled.double(),
        density=balls_around_y.double() / neighbours,
        coverage=covered.double(),
    )
