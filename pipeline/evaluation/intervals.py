"""Confidence intervals of means and medians by the bootstrap (Efron & Tibshirani 1993, section 13.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 1000
BOOTSTRAP = f"95 % confidence, {RESAMPLES} bootstraps"


def bootstrap_interval(
    values: Tensor, seed: int, statistic: Callable[[Tensor], Tensor] = torch.mean
) -> tuple[float, float]:
    """95 % confidence interval of the mean (or another statistic) of `values` `[n]`: percentiles over resamples with
    replacement."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack(
        [statistic(values[torch.randint(len(values), (len(values),), generator=generator)]) for _ in range(RESAMPLES)]
    )
    low, high = torch.quantile(found.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
