"""Inputs that are the same wherever NumPy is: the golden values were made from them, and are checked on them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def features(n: int, dimensions: int, seed: int, rank: int | None = None, shift: float = 0.0) -> np.ndarray:
    """Correlated float64 features `[n, dimensions]`, of full or given rank."""
    inner = rank or dimensions
    z = np.random.default_rng(seed).random((n, inner)) + shift
    return z @ np.random.default_rng(99).random((inner, dimensions)) / inner**0.5


CASES = {
    "full rank": (features(1500, 1024, 1), features(1400, 1024, 2, shift=0.01)),
    "rank-deficient": (features(1200, 1024, 1, rank=200), features(1200, 1024, 2, rank=200, shift=0.01)),
    "fewer samples than dimensions": (features(500, 2048, 1), features(400, 2048, 2, shift=0.01)),
}


def logits(n: int, classes: int) -> np.ndarray:
    return 3 * np.random.default_rng(5).standard_normal((n, classes))


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the same names and shapes: every tensor a function of its name, scaled to keep activations."""
    made = {}
    for name, tensor in state.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if not tensor.dtype.is_floating_point:
            values = np.zeros(tuple(tensor.shape))
        elif tensor.ndim > 1:
            fan_in = float(np.prod(tensor.shape[1:]))
            values = rng.standard_normal(tuple(tensor.shape)) * (2 / fan_in) ** 0.5
        elif name.endswith("running_var"):
            values = 0.5 + rng.random(tuple(tensor.shape))
        else:
            values = 0.1 * rng.standard_normal(tuple(tensor.shape)) + (name.endswith("bn.weight"))
        made[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    return made


def images(n: int, side: int, seed: int) -> Tensor:
    """uint8 `[n, 3, side, side]`: noise at several scales."""
    rng = np.random.default_rng(seed)
    values = sum(
        np.kron(rng.random((n, 3, -(-side // scale), -(-side // scale))), np.ones((1, 1, scale, scale)))[
            :, :, :side, :side
        ]
        for scale in (1, 8, 32)
    )
    return torch.from_numpy((values * 85).astype(np.uint8))  # type: ignore[union-attr]
