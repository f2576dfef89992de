"""Attention of the decoder: the layer, its KV cache, and softmax(scale q k^T + mask) v by one of three backends.

Shapes: B batch, S positions, L positions that are there as keys, D width, H heads, G heads of keys and values,
K = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.attention.flex_attention import flex_attention

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention_patterns import Pattern, length_of
from pipeline.transformer.norms import RMSNorm
from pipeline.transformer.rotary import rotate
from pipeline.transformer.tables import Tables

Backend = Literal["sdpa", "math", "flex"]
Turn = tuple[Tensor, Tensor]  # cosine and sine of rotary positions, [S, K] or [B, S, K] each


@dataclass
class LayerCache:
    """Keys and values of the positions seen so far, preallocated: [B, G, length, K] each."""

    keys: Tensor
    values: Tensor

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write positions start.. and return all up to the last written one (views, no copies)."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Heads(nn.Module):
    """What attention of every kind is made of: projections to heads, the norms of queries and keys, the way out.

    Queries and keys are RMS-normalised (Henry et al. 2020; Dehghani et al. 2023), several heads of queries may share
    one of keys and values (Ainslie et al. 2023).
    """

    def __init__(self, shape: TransformerShape, **heads: int) -> None:
        """`heads`: the projections by name, each to so many heads."""
        super().__init__()
        self.heads, self.kv_heads, self.head_width = shape.heads, shape.key_value_heads, shape.head_width
        self.scale, self.rotary = shape.attention_scale, shape.positions == "rotary"
        for name, count in heads.items():
            self.add_module(name, nn.Linear(shape.width, count * self.head_width, bias=False))
        self.query_norm = RMSNorm(self.head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.out = nn.Linear(shape.width, shape.width, bias=False)


class Attention(Heads):
    """Multi-head self-attention."""

    qkv: nn.Linear

    def __init__(self, shape: TransformerShape, pattern: Pattern) -> None:
        super().__init__(shape, qkv=shape.heads + 2 * shape.key_value_heads)
        self.pattern: Pattern = pattern

    def forward(
        self, x_BSD: Tensor, tables: Tables, cache: LayerCache | None = None, start: int = 0, turn: Turn | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]. With a cache, `x` holds positions start.. only, and sees what is cached before.

        `turn`, with rotary positions: where the codes of `x` lie; None: in the order of the layout.
        """
        batch, length, width = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, -1, self.head_width)
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)  # [B, S, H or G, K]
        query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            cosine, sine = turn or tables.rotary(start, start + length, x_BSD.dtype)
            turned = rotate(torch.cat([query, key], dim=2), cosine, sine)
            query, key = turned.split([self.heads, self.kv_heads], dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value, start)
        mixed = attend(query, key, value, self.scale, self.pattern, tables)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def make_tables(self, tables: Tables, dtype: torch.dtype) -> None:
        """Make what training over whole sequences reads of `tables`: compiled code would trace how it is made."""
        length = length_of(self.pattern, tables.layout)
        if self.rotary:
            tables.rotary(0, length, dtype)
        backend = _backend(tables, self.pattern, length, True, training=True)
        if backend == "math":
            tables.bias(self.pattern, dtype)
        elif backend == "flex":
            tables.block_mask(self.pattern)
        elif self.pattern != "full":
            tables.allowed(self.pattern)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    tables: Tables,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v for the last S of the L positions that `key` holds: [B, H, S, K].

    Args:
        query: [B, H, S, K].
        key, value: [B, G, L, K], L >= S; H / G heads of queries share one of keys.
        backend: how it is computed; None: what `choose_backend` says, and without a compiler `sdpa` in place of `flex`.
    """
    if backend is None:
        queries = query.shape[2]
        whole = queries == key.shape[2] == length_of(pattern, tables.layout)
        backend = _backend(tables, pattern, queries, whole, query.requires_grad)
    if backend == "math":
        return _math(query, key, value, scale, pattern, tables)
    if backend == "flex":
        return _flex(query, key, value, scale, pattern, tables)
    return _sdpa(query, key, value, scale, pattern, tables)


def choose_backend(device: str, pattern: Pattern, queries: int, whole_sequence: bool, training: bool) -> Backend:
    """The fastest backend that can compute this, by device, number of queries and need of a gradient.

    sdpa: wherever the two others do not apply; it takes any lengths, on every device.
    math: training on CPUs, where the backward pass of sdpa takes two to six times as long.
    flex: sparse patterns on GPUs, of which it leaves out the blocks where nothing is seen. Whole sequences only (its
        mask is made once), and not on CPUs (no backward there).
    """
    if device == "cpu" and training and queries > 1:
        return "math"
    if device == "cuda" and pattern != "full" and whole_sequence:
        return "flex"
    return "sdpa"


def _backend(tables: Tables, pattern: Pattern, queries: int, whole_sequence: bool, training: bool) -> Backend:
    chosen = choose_backend(tables.device.type, pattern, queries, whole_sequence, training)
    return "sdpa" if chosen == "flex" and not tables.compiles_flex else chosen


def attend_last(query_BGRK: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The sdpa backend for one position, with the R = H / G heads that share a key as R queries of one head.

    `key` and `value` [B, G, L, K] hold what is cached; `mask` [1, L] (bool, or added to the scores), None: sees all.
    """
    return F.scaled_dot_product_attention(query_BGRK, key, value, attn_mask=mask, scale=scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, without a mask where causality says it all, or all is seen: behind a
    cache positions of the pattern `levels` come a level at a time."""
    length, total = query.shape[2], key.shape[2]
    all_seen = pattern == "levels" and length < total
    mask = None if pattern == "full" or all_seen else tables.allowed(pattern)[total - length : total, :total]
    if length == 1:
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        return attend_last(grouped, key, value, scale, mask).reshape(query.shape)
    if pattern == "full" and length < total:  # is_causal would align the first query with the first key
        mask = tables.allowed(pattern)[total - length : total, :total]
    shared = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and not all_seen, scale=scale, enable_gqa=shared
    )


def _math(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
    """Two matrix products and a softmax. Heads that share a key are more queries of one head: no key is copied."""
    batch, heads, length, width = query.shape
    total = key.shape[2]
    bias = tables.bias(pattern, query.dtype)[total - length : total, :total]
    if key.shape[1] == heads:
        return torch.add(bias, query @ key.transpose(-1, -2), alpha=scale).softmax(dim=-1) @ value
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, length, -1)
    shares = torch.add(bias, scores, alpha=scale).softmax(dim=-1)
    return (shares.view(batch, key.shape[1], -1, total) @ value).view(query.shape)


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
    """FlexAttention (Dong et al. 2024) over whole sequences: L = S = all positions.

    Column layers go through it column by column, as Ramesh et al. 2021 transpose the image there (appendix B.1): of 55
    blocks on and below the diagonal at 32 x 32 codes after 256 of text it computes 40 then, as for rows, else all.
    """
    if pattern == "column":
        order, inverse = tables.column_major()
        query, key, value = (_InOrder.apply(x, order, inverse) for x in (query, key, value))
    attention: Callable[..., Tensor] = flex_attention
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        attention = _compiled_flex()
    shared = key.shape[1] != query.shape[1]
    mixed = attention(query, key, value, block_mask=tables.block_mask(pattern), scale=scale, enable_gqa=shared)
    if pattern == "column":
        mixed = _InOrder.apply(mixed, inverse, order)
    return mixed


class _InOrder(torch.autograd.Function):
    """x[:, :, order], whose gradient is read in the inverse order: autograd would add it up in zeros, atomically."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BHSK: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_S)
        return x_BHSK.index_select(2, order_S)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient_BHSK: Tensor) -> tuple[Tensor, None, None]:
        (inverse_S,) = ctx.saved_tensors
        return gradient_BHSK.index_select(2, inverse_S), None, None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
