"""Orders of the image codes: coarse levels first, any order within a level.

An order [B, N] holds at place i the index, among the N codes of all levels, of the code that comes i-th.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.seeds import hash63
from pipeline.transformer.layout import Layout

_63_BITS = 2**63 - 1


def sorted_within_levels(keys_BN: Tensor, layout: Layout) -> Tensor:
    """The order in which each level's codes have rising keys; among equal ones raster order: int64 [B, N]."""
    parts = keys_BN.split([level.positions for level in layout.levels], dim=1)
    starts = layout.level_starts
    return torch.cat([k.argsort(dim=1, stable=True) + s for k, s in zip(parts, starts, strict=True)], dim=1)


def random_orders(codes_BN: Tensor, layout: Layout, seed: int, step: int, share: float = 1.0) -> Tensor:
    """A random order for each sample, or for a `share` of them and raster order for the others: int64 [B, N].

    A function of (seed, step, the sample's own codes) alone: the same at any number of processes and micro-batches,
    after a resume, and on any device. Integer arithmetic, which nowhere waits for the device.
    """
    places_N = torch.arange(codes_BN.shape[1], device=codes_BN.device)
    sample_B1 = _mix(_mix(places_N + 1) ^ _mix(codes_BN + 1)).sum(dim=1, keepdim=True)
    salt = hash63("order", seed, step)
    keys_BN = _mix(_mix(sample_B1 + salt) ^ _mix(places_N + 1))
    if share < 1:
        chosen_B1 = _mix(sample_B1 + hash63("anneal", seed, step)) & _63_BITS
        keys_BN = torch.where(chosen_B1 < int(share * 2**63), keys_BN, places_N)
    return sorted_within_levels(keys_BN, layout)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014) on int64, whose products wrap around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
