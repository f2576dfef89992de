"""Kernel Inception Distance (Bińkowski et al. 2018, section 4): unbiased, so small sets may be compared.

    KID = mean k(x, x') + mean k(y, y') − 2 mean k(x, y),    k(a, b) = (aᵀb / d + 1)³

over pairs of different samples within each set and all pairs between the sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.metrics.checks import Array, checked_pair


def kernel_distance(
    real: Array, generated: Array, subsets: int, subset_size: int, generator: torch.Generator
) -> tuple[float, float]:
    """Mean and standard deviation of KID over random subsets of both sets `[n, d]`, `[m, d]`.

    Around zero the estimate may be slightly negative; that is what unbiased means.

    Raises:
        UserError: fewer samples than `subset_size`, `subset_size` below 2, unequal dimensions, NaN.
    """
    if subset_size < 2:
        raise UserError(f"KID: expected subset_size of at least 2, found {subset_size}")
    x, y = checked_pair(real, generated, at_least=subset_size, reason="KID's subset_size")
    values = []
    for _ in range(subsets):
        chosen_x = torch.randperm(len(x), generator=generator)[:subset_size]
        chosen_y = torch.randperm(len(y), generator=generator)[:subset_size]
        values.append(_squared_mmd(x[chosen_x].double(), y[chosen_y].double()))
    result = torch.stack(values)
    return result.mean().item(), result.std(unbiased=False).item()


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of two sets of equal size m."""
    m = len(x)
    within = _kernel(x, x).fill_diagonal_(0).sum() + _kernel(y, y).fill_diagonal_(0).sum()
    return within / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
