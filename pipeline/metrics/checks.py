"""Checks that every metric makes of its input; what does not hold is said in one line."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import UserError

Array = Tensor | np.ndarray
BLOCK = 2048  # rows in float64 at a time, so that sets larger than memory allows in float64 can be measured


def checked(values: Array, name: str, at_least: int = 1, reason: str = "one sample") -> Tensor:
    """`values` as a tensor `[samples, dimensions]`, in its own type and on its device: nothing is copied.

    Raises:
        UserError: other than two dimensions, fewer than `at_least` samples (`reason` names what
            needs them), or a value that is NaN or infinite.
    """
    tensor = torch.as_tensor(values)
    if tensor.ndim != 2:
        raise UserError(f"{name}: expected an array [samples, dimensions], found shape {tuple(tensor.shape)}")
    if len(tensor) < at_least:
        raise UserError(f"{name}: expected at least {at_least} samples ({reason}), found {len(tensor)}; add images")
    finite = torch.cat([torch.isfinite(block).all(dim=1) for block in torch.split(tensor, BLOCK)])
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise UserError(
            f"{name}: expected finite numbers, found NaN or infinity in {int((~finite).sum())} of {len(tensor)} "
            f"samples (the first is sample {first}); check what made them"
        )
    return tensor


def checked_pair(real: Array, generated: Array, at_least: int = 1, reason: str = "one sample") -> tuple[Tensor, Tensor]:
    """`checked` of both sets, which must have equal dimensions."""
    pair = checked(real, "real", at_least, reason), checked(generated, "generated", at_least, reason)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise UserError(
            f"features of real and generated images: expected equal dimensions, found {pair[0].shape[1]} and "
            f"{pair[1].shape[1]}; use one extractor for both"
        )
    return pair
