"""Matrix products x W^T in which a row's bits do not depend on how many rows there are: oneDNN's, of packed weights.

    product = RowProduct(weight)                   # [E, D]
    y = product(x)                                 # [M, D] -> [M, E], for any M
    product.rounds_alike                           # the promise, as far as it was tried on this machine

It has one kernel for any number of rows from two on, and for many matrices for one row, too; where not, a lone row is
taken twice. MKL's products, torch's own, round by how many columns there are (2 and 3 alike, 4 to 10, 12 and more).

The matrices of two layers of 256 and a head of 1,024 codes in float32, one thread, AMD's fourth generation, median of
60: 1 row 0.54 ms packed, 0.47 as `cached_step.py` takes them; 4 rows 0.64 and 0.63; 8 rows 0.84 and 1.03.

Shapes: M rows, D width of x, E of the product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampling.packed_weights import can_pack, multiply, pack

_TRIED = (2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 33)  # numbers of rows


class RowProduct:
    """Of one matrix, of which it holds a copy where it can be packed."""

    def __init__(self, weight: Tensor) -> None:
        can, trial = can_pack(weight), (weight.shape, weight.dtype)
        self.rounds_alike = can and _any_number_rounds_alike(*trial)
        self._twice = self.rounds_alike and not _one_row_rounds_alike(*trial)
        self._weight = pack(weight, _TRIED[-1]) if self.rounds_alike else weight

    def __call__(self, x_MD: Tensor) -> Tensor:
        if not self.rounds_alike:
            return F.linear(x_MD, self._weight)
        if self._twice and len(x_MD) == 1:
            return multiply(x_MD.repeat(2, 1), self._weight)[:1]
        return multiply(x_MD, self._weight)


@cache
def _any_number_rounds_alike(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether rows have the same bits in any number from two on."""
    x_MD, packed = _trial(shape, dtype)
    whole = multiply(x_MD, packed)
    return all(torch.equal(multiply(x_MD[:rows], packed), whole[:rows]) for rows in _TRIED)


@cache
def _one_row_rounds_alike(shape: torch.Size, dtype: torch.dtype) -> bool:
    x_MD, packed = _trial(shape, dtype)
    one_by_one = [multiply(row, packed) for row in x_MD[:8].split(1)]
    return torch.equal(torch.cat(one_by_one), multiply(x_MD[:8], packed))


def _trial(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows, and a packed matrix of this shape, of random numbers."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=numbers).to(dtype)
    return torch.randn(_TRIED[-1] + 7, shape[1], generator=numbers).to(dtype), pack(weight, _TRIED[-1])
