"""Nearest neighbours by Euclidean distance, in blocks: the distances of two whole sets never lie in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.metrics.checks import BLOCK, Array, checked_pair


def nearest(queries: Array, references: Array) -> tuple[Tensor, Tensor]:
    """For each query `[n, d]` its nearest reference `[m, d]`: distances float64 `[n]`, indices int64 `[n]`."""
    x, y = checked_pair(references, queries)
    best = torch.full((len(y),), torch.inf, dtype=torch.float64, device=y.device)
    index = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    for rows in blocks(len(y)):
        block = y[rows].double()
        for columns in blocks(len(x)):
            found = distances(block, x[columns].double()).min(dim=1)
            closer = found.values < best[rows]
            best[rows] = torch.where(closer, found.values, best[rows])
            index[rows] = torch.where(closer, found.indices + columns.start, index[rows])
    return best, index


def kth_neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Distance of each sample of `[n, d]` to its k-th nearest neighbour, itself not counted: float64 `[n]`."""
    smallest = torch.full((len(x), k), torch.inf, dtype=torch.float64, device=x.device)
    parts = blocks(len(x))
    for i, rows in enumerate(parts):
        block = x[rows].double()
        for columns in parts[i:]:  # a distance is that of both its ends
            distance = distances(block, x[columns].double())
            if columns == rows:
                distance.fill_diagonal_(torch.inf)
            else:
                smallest[columns] = _k_smallest(smallest[columns], distance.T)
            smallest[rows] = _k_smallest(smallest[rows], distance)
    return smallest.max(dim=1).values


def blocks(n: int) -> list[slice]:
    """Slices of at most `BLOCK` rows that cover n."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances `[n, m]` of `[n, d]` and `[m, d]`."""
    squared = torch.addmm(a.square().sum(dim=1)[:, None] + b.square().sum(dim=1), a, b.T, alpha=-2)
    return squared.clamp_(min=0).sqrt_()


def _k_smallest(known: Tensor, more: Tensor) -> Tensor:
    """The k smallest values of each row of `known` `[n, k]` and `more` `[n, m]` together: `[n, k]`."""
    k = known.shape[1]
    found = more.topk(min(k, more.shape[1]), dim=1, largest=False).values
    return torch.cat([known, found], dim=1).topk(k, dim=1, largest=False).values
