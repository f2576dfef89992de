"""The layers of the decoder: RMSNorm, causal attention with QK-norm and an optional KV cache, SwiGLU.

Shapes: B batch, S positions, D width, H heads, K = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.transformer.config import TransformerShape


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019) in the precision of x: autocast would make it float32."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def working_precision(x: Tensor) -> Tensor:
    """Under autocast, the residual stream in its dtype: on CPUs float32 here would halve the training speed."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@dataclass
class LayerCache:
    """Keys and values of the positions seen so far, preallocated: [B, H, length, K] each."""

    keys: Tensor
    values: Tensor

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write positions start.. and return all up to the last written one (views, no copies)."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal multi-head attention; queries and keys are RMS-normalised (Henry et al. 2020; Dehghani et al. 2023)."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        head_width = shape.width // shape.heads
        self.query_norm = RMSNorm(head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_width, eps=1e-6) if shape.qk_norm else nn.Identity()
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """With a cache, `x` holds positions start.. only, and attends to everything cached before them."""
        batch, length, width = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(2)  # [B, S, H, K] each
        query = self.query_norm(query).transpose(1, 2)
        key = self.key_norm(key).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value, start)
        if start and length > 1:  # several positions at once, after what is cached
            seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=x_BSD.device).tril(start)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        else:  # one new position sees all of the cache
            mixed = attend(query, key, value, causal=length > 1)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(K)) v on [B, H, S, K], through `scaled_dot_product_attention` where that is fast.

    Its backward on CPUs is not: forward and backward in bf16 at B=32, H=4, K=64 on two cores took 25 ms against
    4 ms of the three plain operations at S=72, and 22 against 10 at S=288. So training there uses those.
    """
    if query.device.type != "cpu" or not (causal and query.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    length = query.shape[2]
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.add(future, query @ key.transpose(-1, -2), alpha=query.shape[-1] ** -0.5)
    return scores.softmax(dim=-1) @ value


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020); gate and value come from one matrix product."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.gate_value = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, value = self.gate_value(x_BSD).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, eps=1e-6)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.width, eps=1e-6)
        self.mlp = SwiGLU(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), cache, start))
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))
