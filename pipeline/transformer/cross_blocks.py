"""The layers that ask: queries, which know a position and no code, attend to what the layers before have read.

Shapes: B batch, Q queries, S positions that are read, D width, H heads, G heads of keys and values, K = D / H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention import Heads, LayerCache, Turn, attend, choose_backend
from pipeline.transformer.blocks import GELU, SwiGLU
from pipeline.transformer.norms import build_norm
from pipeline.transformer.rotary import rotate
from pipeline.transformer.tables import Tables


class Turns(NamedTuple):
    """Rotary positions of queries and of what is read."""

    queries: Turn
    memory: Turn


class CrossAttention(Heads):
    """Multi-head attention of queries to keys and values that are made of the memory, what has been read."""

    query: nn.Linear
    key_value: nn.Linear

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__(shape, query=shape.heads, key_value=2 * shape.key_value_heads)

    def forward(
        self,
        x_BQD: Tensor,
        memory_BSD: Tensor,
        tables: Tables,
        turns: Turns | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """[B, Q, D] -> [B, Q, D].

        Without a cache query i sees memory 0 .. i (Q = S). With one, the S >= 0 positions of `memory` go into it from
        `start` on, and every query sees all that is there then.
        """
        batch, count, width = x_BQD.shape
        query = self.query_norm(self.query(x_BQD).view(batch, count, self.heads, self.head_width))
        if turns is not None:
            query = rotate(query, *turns.queries)
        query = query.transpose(1, 2)
        if cache is None:
            key, value = self._key_value(memory_BSD, turns)
            mixed = attend(query, key, value, self.scale, "full", tables)
        else:
            if memory_BSD.shape[1]:
                cache.extend(*self._key_value(memory_BSD, turns), start)
            end = start + memory_BSD.shape[1]
            key, value = cache.keys[:, :, :end], cache.values[:, :, :end]
            shared = self.kv_heads != self.heads
            mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale, enable_gqa=shared)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, width))

    def _key_value(self, memory_BSD: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        """[B, G, S, K] each."""
        key, value = self.key_value(memory_BSD).unflatten(-1, (2 * self.kv_heads, self.head_width)).chunk(2, dim=2)
        key = self.key_norm(key)
        if turns is not None:
            key = rotate(key, *turns.memory)
        return key.transpose(1, 2), value.transpose(1, 2)

    def make_tables(self, tables: Tables, dtype: torch.dtype) -> None:
        """As `Attention.make_tables`."""
        if choose_backend(tables.device.type, "full", tables.layout.length, True, training=True) == "math":
            tables.bias("full", dtype)


class CrossBlock(nn.Module):
    """Pre-norm residual block of cross-attention and MLP; the memory comes with a norm of its own behind it."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.attention_norm = build_norm(shape)
        self.attention = CrossAttention(shape)
        self.mlp_norm = build_norm(shape)
        self.mlp = SwiGLU(shape) if shape.mlp == "swiglu" else GELU(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        x_BQD: Tensor,
        memory_BSD: Tensor,
        tables: Tables,
        turns: Turns | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x_BQD), memory_BSD, tables, turns, cache, start)
        x_BQD = x_BQD + self.dropout(mixed)
        return x_BQD + self.dropout(self.mlp(self.mlp_norm(x_BQD)))
