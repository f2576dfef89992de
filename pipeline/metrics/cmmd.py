"""CMMD (Jayasumana et al. 2024, section 4): the maximum mean discrepancy of CLIP's embeddings, with a Gaussian kernel.

    1000 · ( mean k(x, x') + mean k(y, y') − 2 mean k(x, y) ),    k(a, b) = exp( −|a − b|² / (2 · 10²) )

of embeddings of unit length, over all pairs, a sample with itself among them: the paper's own code has it so, and
identical sets are at 0. It is CMMD on CLIP (the paper's: ViT-L/14 at 336 pixels); the formula holds for any features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.metrics.checks import Array, checked_pair
from pipeline.metrics.neighbours import blocks, distances

SIGMA, SCALE = 10.0, 1000.0


def cmmd(real: Array, generated: Array) -> float:
    """The discrepancy of two sets `[n, d]` and `[m, d]`, at least 0 but for rounding; lower is better.

    Raises:
        UserError: an empty set, unequal dimensions, NaN.
    """
    x, y = checked_pair(real, generated)
    return SCALE * float(_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in blocks(len(a)):
        block = normalize(a[rows].double(), dim=1)
        for columns in blocks(len(b)):
            apart = distances(block, normalize(b[columns].double(), dim=1))
            total += torch.exp(-apart.square() / (2 * SIGMA**2)).sum()
    return total / (len(a) * len(b))
