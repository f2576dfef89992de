"""The layers of the decoder: norms, attention with QK-norm, rotary positions and an optional KV cache, MLPs.

Shapes: B batch, S positions, D width, H heads, G heads of keys and values, K = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention_patterns import Pattern, Tables, pattern_of
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
    """Ba et al. 2016, in the precision of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def build_norm(shape: TransformerShape) -> nn.Module:
    return RMSNorm(shape.width, eps=1e-6) if shape.norm == "rmsnorm" else LayerNorm(shape.width, eps=1e-6)


def working_precision(x: Tensor) -> Tensor:
    """Under autocast, the residual stream in its dtype: on CPUs float32 here would halve the training speed."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


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


class Attention(nn.Module):
    """Multi-head attention; queries and keys are RMS-normalised (Henry et al. 2020; Dehghani et al. 2023), several
    heads of queries may share one of keys and values (Ainslie et al. 2023)."""

    def __init__(self, shape: TransformerShape, pattern: Pattern) -> None:
        super().__init__()
        self.pattern: Pattern = pattern
        self.heads, self.kv_heads, self.head_width = shape.heads, shape.key_value_heads, shape.head_width
        self.scale, self.rotary = shape.attention_scale, shape.positions == "rotary"
        self.qkv = nn.Linear(shape.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.query_norm = RMSNorm(self.head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BSD: Tensor, tables: Tables, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """With a cache, `x` holds positions start.. only, and sees what is cached before them."""
        batch, length, width = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, -1, self.head_width)
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)  # [B, S, H or G, K]
        query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            cosine, sine = tables.rotary(start, start + length, x_BSD.dtype)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value, start)
        mixed = attend(query, key, value, self.scale, self.pattern, tables)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x_BSHK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs (i, i + K / 2) by the angles of their positions; cosine and sine [S, K / 2]."""
    first, second = x_BSHK.chunk(2, dim=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
    """softmax(scale q k^T + mask) v for the last positions of those that `key` holds.

    query [B, H, S, K]; key, value [B, G, L, K], L >= S. Through `scaled_dot_product_attention`, and for sparse patterns
    on GPUs FlexAttention, which leaves out what no position of a block sees.
    The backward of the former on CPUs is slow: forward and backward in bf16 at B=32, H=4, K=64 on two cores took 25 ms
    against 4 ms of the three plain operations at S=72, and 22 against 10 at S=288. So training there uses those.
    """
    length, total = query.shape[2], key.shape[2]
    if query.device.type == "cpu" and length > 1 and query.requires_grad:
        return _plain(query, key, value, scale, tables.bias(pattern, query.dtype)[total - length : total, :total])
    if query.device.type == "cuda" and pattern != "full" and length == total == tables.layout.length:
        return flex(query, key, value, scale, pattern, tables)
    if length == 1 and key.shape[1] != query.shape[1]:  # heads that share a key are queries of one head
        grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return attend_masked(grouped, key, value, scale, pattern, tables, total - 1).view(query.shape)
    return attend_masked(query, key, value, scale, pattern, tables, total - length)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables, start: int
) -> Tensor:
    """`attend` through `scaled_dot_product_attention`; the first query is position `start`."""
    total = key.shape[2]
    mask, causal = None, False
    if pattern != "full" or 0 < start < total - 1:
        mask = tables.allowed(pattern)[start:total, :total]
    else:  # the last position alone sees everything
        causal = start < total - 1
    shared = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Heads that share a key are taken as more queries of one head, so that no key is copied."""
    batch, heads, length, width = query.shape
    if key.shape[1] == heads:
        return torch.add(bias, query @ key.transpose(-1, -2), alpha=scale).softmax(dim=-1) @ value
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, length, -1)
    shares = torch.add(bias, scores, alpha=scale).softmax(dim=-1)
    return (shares.view(batch, key.shape[1], -1, key.shape[2]) @ value).view(query.shape)


def flex(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
    """`attend` over whole sequences through FlexAttention (Dong et al. 2024)."""
    shared: Any = key.shape[1] != query.shape[1]
    attention = _compiled_flex() if query.device.type == "cuda" else _flex_attention()
    mixed: Tensor = attention(query, key, value, block_mask=tables.block_mask(pattern), scale=scale, enable_gqa=shared)
    return mixed


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled_flex() -> Any:
    return torch.compile(_flex_attention(), dynamic=False)


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020); gate and value come from one matrix product."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.gate_value = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, value = self.gate_value(x_BSD).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


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

    def forward(self, x_BSD: Tensor, tables: Tables, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), tables, cache, start))
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))
