"""Authenticity (Alaa et al. 2022, section 4.3): which generated images are no copies of training images.

A generated image is authentic if its nearest training image has another training image nearer than it. The share of
authentic ones in per cent is AuthPct, as Stein et al. 2023 (dgm-eval) report it: a model that copies falls to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.metrics.checks import Array, checked, checked_pair
from pipeline.metrics.neighbours import blocks, distances, nearest


def authentic(training: Array, generated: Array) -> Tensor:
    """Whether each generated sample `[m, d]` is authentic beside the training samples `[n, d]`: bool `[m]`.

    Raises:
        UserError: fewer than 2 training samples, unequal dimensions, NaN.
    """
    x, _ = checked_pair(training, generated)
    checked(x, "training", at_least=2, reason="each one's nearest other")
    apart, indices = nearest(generated, training)
    asked, place = torch.unique(indices, return_inverse=True)
    return _nearest_other(x, asked)[place] < apart


def _nearest_other(x: Tensor, asked: Tensor) -> Tensor:
    """Distance of the samples `asked` `[k]` of `[n, d]` to their nearest other sample: float64 `[k]`."""
    best = torch.full((len(asked),), torch.inf, dtype=torch.float64, device=x.device)
    for rows in blocks(len(asked)):
        block = x[asked[rows]].double()
        for columns in blocks(len(x)):
            found = distances(block, x[columns].double())
            itself = asked[rows, None] == torch.arange(columns.start, columns.stop, device=x.device)
            best[rows] = torch.minimum(best[rows], found.masked_fill_(itself, torch.inf).min(dim=1).values)
    return best
