"""Weights in oneDNN's own layout, and products with them: faster than MKL's for few rows, and rounded in another way.

The layout is a copy: such a matrix takes its memory twice, and has to be packed anew when its weights change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.arithmetic import cpu_has_bf16


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has the layout for a matrix of such a device and precision."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return cpu_has_bf16()
    return weight.dtype == torch.float32


def pack(weight: Tensor, rows: int) -> Tensor:
    """A matrix [E, D] in the layout that suits products of `rows` rows; it serves any number."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def multiply(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T, of x [..., D] and W [E, D] as `pack` makes it: [..., E]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    return product
