"""The two norms of the decoder, both in the precision of what comes in: autocast on GPUs would make it float32.

D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019) in the precision of x."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.eps is not None
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps)
        with _no_autocast(x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in the precision of x."""

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast has norms in float32 on GPUs, not on CPUs."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind != "cpu" and torch.is_autocast_enabled(kind) else nullcontext()


def build_norm(shape: TransformerShape) -> nn.Module:
    """The norm over D that `shape.norm` names."""
    return RMSNorm(shape.width, eps=1e-6) if shape.norm == "rmsnorm" else LayerNorm(shape.width, eps=1e-6)
