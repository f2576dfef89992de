"""A transformer of order any or scale as CPUs run it fastest: weights in oneDNN's own layout, norms of few operations.

    fast = packed(model)          # a model of the same class, with the same parameters and logits but for rounding

Their passes multiply some rows at a time, for which MKL has no kernel that keeps up with memory. All 25 matrices of a
model of 6 layers of 256 with 8,192 codes, float32, one thread, the least of 25 times in ms, `torch.mm` and so:

    rows        2            8            16           32           128
                3.1 and 1.4  5.2 and 2.0  5.8 and 3.0  8.8 and 5.4  23.6 and 18.3

A model whose weights change has to be packed anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.pretrained import parameters_without_memory
from pipeline.sampling.cached_step import level_weights, norm_of
from pipeline.sampling.packed_weights import can_pack, multiply, pack
from pipeline.transformer.build import build_transformer
from pipeline.transformer.model import Transformer
from pipeline.transformer.norms import RMSNorm

_ROWS = 16  # that the layout is chosen for; it serves any number


class PackedLinear(nn.Module):
    """x W^T, of x [..., D] in float32; in other precisions as without."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight.detach()
        self._packed = pack(self._weight, _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return F.linear(x, self._weight)
        return multiply(x, self._packed)


class FastNorm(nn.Module):
    """An RMSNorm, without a gradient."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self._norm = norm_of(norm)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._norm(x, out)
        return out


@torch.no_grad()
def packed(model: Transformer) -> Transformer:
    """The model for drawing; `model` itself where nothing is faster: raster, other devices and precisions."""
    weight = model.head.weight
    if model.order == "raster" or weight.dtype != torch.float32 or not can_pack(weight):
        return model
    with parameters_without_memory():
        fast = build_transformer(model.layout, model.shape)
    fast.load_state_dict(model.state_dict(), assign=True)
    for block in fast.blocks:
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    parent.register_module(name, PackedLinear(child.weight))
                elif isinstance(child, RMSNorm):
                    parent.register_module(name, FastNorm(child))
    fast.level_heads = [PackedLinear(head) for head in level_weights(fast)[1]]
    return fast.eval()
