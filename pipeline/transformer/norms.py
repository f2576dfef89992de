"""The two norms of the decoder, both in the precision of what comes in. D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019) in the precision of x: autocast would make it float32."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.eps is not None
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in the precision of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def build_norm(shape: TransformerShape) -> nn.Module:
    """The norm over D that `shape.norm` names."""
    return RMSNorm(shape.width, eps=1e-6) if shape.norm == "rmsnorm" else LayerNorm(shape.width, eps=1e-6)
