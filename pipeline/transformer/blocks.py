"""The layers of the decoder: pre-norm blocks of attention (attention.py) and an MLP.

Shapes: B batch, S positions, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention import Attention, LayerCache, Turn
from pipeline.transformer.attention_patterns import pattern_of
from pipeline.transformer.functional import swiglu
from pipeline.transformer.norms import build_norm
from pipeline.transformer.tables import Tables


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020); gate and value come from one matrix product."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.gate_value = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.out(swiglu(self.gate_value(x_BSD)))


class GELU(nn.Module):
    """The MLP of Vaswani et al. 2017 with GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.hidden = nn.Linear(shape.width, shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x_BSD)))


class Block(nn.Module):
    """Pre-norm residual block; `layer` counts from 0."""

    def __init__(self, shape: TransformerShape, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(shape)
        self.attention = Attention(shape, pattern_of(layer, shape))
        self.mlp_norm = build_norm(shape)
        self.mlp = SwiGLU(shape) if shape.mlp == "swiglu" else GELU(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, x_BSD: Tensor, tables: Tables, cache: LayerCache | None = None, start: int = 0, turn: Turn | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), tables, cache, start, turn))
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))
