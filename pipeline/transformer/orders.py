"""Orders of the image codes: coarse levels first, any order within a level.

An order [B, N] holds at place i the index, among the N codes of all levels, of the code that comes i-th.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.seeds import hash63
from pipeline.transformer.layout import Layout

_63_BITS = 2**63 - 1
_SIDE = 2**15  # a side of the image, in which edges of holes are counted


def sorted_within_levels(keys_BN: Tensor, layout: Layout) -> Tensor:
    """The order in which each level's codes have rising keys; among equal ones raster order: int64 [B, N]."""
    parts = keys_BN.split([level.positions for level in layout.levels], dim=1)
    starts = layout.level_starts
    return torch.cat([k.argsort(dim=1, stable=True) + s for k, s in zip(parts, starts, strict=True)], dim=1)


def random_orders(
    codes_BN: Tensor, layout: Layout, seed: int, step: int, share: float = 1.0, holes: float = 0.0
) -> Tensor:
    """A random order for each sample, or for a `share` of them and raster order for the others: int64 [B, N].

    A share of `holes` of the random ones fill a hole: a rectangle of the image, of a quarter to the whole of each side,
    whose codes come last in their level, as those do that a mask leaves out.

    A function of (seed, step, the sample's own codes) alone: the same at any number of processes and micro-batches,
    after a resume, and on any device. Integer arithmetic, which nowhere waits for the device.
    """
    places_N = torch.arange(codes_BN.shape[1], device=codes_BN.device)
    sample_B1 = _mix(_mix(places_N + 1) ^ _mix(codes_BN + 1)).sum(dim=1, keepdim=True)

    def hashed(what: str) -> Tensor:
        return _mix(sample_B1 + hash63(what, seed, step))

    def chosen(what: str, of: float) -> Tensor:
        return (hashed(what) & _63_BITS) < min(int(of * 2**63), _63_BITS)

    keys_BN = _mix(_mix(sample_B1 + hash63("order", seed, step)) ^ _mix(places_N + 1))
    if holes > 0:
        last_BN = _in_rectangle(hashed("rectangle"), layout) & chosen("hole", holes)
        keys_BN = (keys_BN >> 2) + last_BN * 2**62  # the same order on either side of it
    if share < 1:
        keys_BN = torch.where(chosen("anneal", share), keys_BN, places_N)
    return sorted_within_levels(keys_BN, layout)


def _in_rectangle(random_B1: Tensor, layout: Layout) -> Tensor:
    """Which codes' squares touch the rectangle that 60 random bits stand for, one for all levels: bool [B, N]."""
    height_B1, width_B1, down_B1, right_B1 = (random_B1 >> shift & _SIDE - 1 for shift in (0, 15, 30, 45))

    def touches(count: int, random_length_B1: Tensor, random_start_B1: Tensor) -> Tensor:
        """[B, count]"""
        length_B1 = _SIDE // 4 + (3 * random_length_B1 >> 2)
        start_B1 = random_start_B1 * (_SIDE - length_B1) >> 15
        edges = torch.arange(count + 1, device=random_B1.device) * _SIDE // count
        return (edges[:-1] < start_B1 + length_B1) & (edges[1:] > start_B1)

    parts = []
    for level in layout.levels:
        rows, columns = touches(level.height, height_B1, down_B1), touches(level.width, width_B1, right_B1)
        parts.append((rows[:, :, None] & columns[:, None]).flatten(1))
    return torch.cat(parts, dim=1)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014) on int64, whose products wrap around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
