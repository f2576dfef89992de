"""LPIPS, a learned perceptual distance of two images (Zhang et al. 2018, section 3, eq. 1).

    d(x, y) = Σ_l  mean over positions of  w_l · (ŷ_l − x̂_l)²

with x̂_l the activations of layer l scaled to unit length in each position, and w_l ≥ 0 learned from people's choices.
From 0 (equal); lower is better. `extractors/lpips_vgg16.py` has the network and its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def lpips_distance(activations: Sequence[Tensor], others: Sequence[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """d of each pair of images, float64 `[n]`, from both images' activations `[n, C, h, w]` of each layer, scaled by
    `unit_length`, and the layers' weights w_l `[1, C, 1, 1]`."""
    distance = torch.zeros(len(activations[0]), dtype=torch.float64, device=activations[0].device)
    for weight, x, y in zip(weights, activations, others, strict=True):
        distance += (weight * (x - y).square()).sum(dim=1).mean(dim=(1, 2)).double()
    return distance


def unit_length(activations: Tensor) -> Tensor:
    """Activations `[n, C, h, w]` with each position scaled to length 1 over the channels."""
    return activations / (activations.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
