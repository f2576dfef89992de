"""One code through the transformer: the step of the decode loop, with as few operations as it takes.

`Transformer.read_codes` says the same in the words of training. At one position a row, what an operation costs to
start outweighs what it computes (3 to 5 µs each on a CPU, more on a GPU), so this step prepares what all positions
share, and spends one operation where the general form takes five. `tests/sampling/test_step.py` holds it to the full
pass at every position of every shape.

Shapes: B rows, D width, H heads, G heads of keys and values, K = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.transformer.blocks import GELU, Attention, Block, LayerCache, RMSNorm, SwiGLU
from pipeline.transformer.model import Cache, Transformer
from pipeline.transformer.places import rotary_angles

Norm = Callable[[Tensor], Tensor]


class CodeReader:
    """Reads codes into a cache, one position at a time, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache, compiled: bool = False) -> None:
        """`compiled`: through `torch.compile`, which takes its time at the first code."""
        layout, kind = model.layout, cache[0].keys.dtype
        self._embedding = model.embedding
        self._offsets = [layout.level_offsets[layout.level_at(i)] for i in range(layout.image_length)]
        places = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
        self._places = torch.cat(places) if places else None
        self._level_at = [layout.level_at(i) for i in range(layout.image_length)]
        sizes = [level.codebook_size for level in layout.levels]
        self._heads = [model.head.weight[o : o + n] for o, n in zip(layout.level_offsets, sizes, strict=True)]
        self._first = layout.text_length + 1
        self._turns = _Turns.of(model, kind) if model.shape.positions == "rotary" else None
        self._layers = [_Layer.of(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm = _one_position(model.norm)
        self._through = torch.compile(_through, dynamic=True) if compiled else _through

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        """What predicts code `index` of the N, over its level's codes: float32 [B, V]."""
        head_VD = self._heads[self._level_at[index]]
        return _product(head_VD, hidden_BD).float().contiguous()

    def read(self, code_B: Tensor, index: int) -> Tensor:
        """Put code `index` of the N into the cache; returns the hidden state [B, D] that predicts the next."""
        x_BD = self._embedding(code_B + self._offsets[index])
        if self._places is not None:
            x_BD = x_BD + self._places[index]
        return self._norm(self._through(self._layers, self._turns, x_BD, self._first + index))


@dataclass
class _Turns:
    """Rotary positions as x * cosine + swapped(x) * sine, with the halves of a head swapped: [S, K] each."""

    cosine: Tensor
    sine: Tensor

    @classmethod
    def of(cls, model: Transformer, kind: torch.dtype) -> _Turns:
        angles = rotary_angles(model.layout, model.shape.head_width, model.embedding.weight.device)
        cosine, sine = angles.cos(), angles.sin()
        return cls(torch.cat([cosine, cosine], 1).to(kind), torch.cat([-sine, sine], 1).to(kind))

    def turn(self, x_BHK: Tensor, position: int) -> Tensor:
        swapped = x_BHK.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return torch.addcmul(x_BHK * self.cosine[position], swapped, self.sine[position])


@dataclass
class _Layer:
    """A block and its cache, with norms that suit one position."""

    attention: Attention
    mlp: SwiGLU | GELU
    attention_norm: Norm
    head_norm: Norm | None  # of queries and keys together
    mlp_norm: Norm
    bias: Tensor | None  # of a sparse pattern: 0 where position (row) sees position (column), else -inf
    cache: LayerCache

    @classmethod
    def of(cls, model: Transformer, block: nn.Module, cache: LayerCache) -> _Layer:
        assert isinstance(block, Block)
        own = block.attention
        bias = None if own.pattern == "full" else model.tables.bias(own.pattern, cache.keys.dtype)
        norms = _one_position(block.attention_norm), _of_heads(own), _one_position(block.mlp_norm)
        return cls(own, block.mlp, *norms, bias, cache)


def _through(layers: list[_Layer], turns: _Turns | None, x_BD: Tensor, position: int) -> Tensor:
    for layer in layers:
        x_BD = x_BD + _product(layer.attention.out.weight, _attended(layer, turns, x_BD, position))
        x_BD = x_BD + _product(layer.mlp.out.weight, _hidden(layer.mlp, layer.mlp_norm(x_BD)))
    return x_BD


def _attended(layer: _Layer, turns: _Turns | None, x_BD: Tensor, position: int) -> Tensor:
    """What the heads have found at one position, which sees what its pattern shows of the cache: [B, D]."""
    own, cache, end = layer.attention, layer.cache, position + 1
    qkv = _product(own.qkv.weight, layer.attention_norm(x_BD)).reshape(len(x_BD), -1, own.head_width)
    query_key, value = qkv.split([own.heads + own.kv_heads, own.kv_heads], dim=1)  # [B, H + G, K], [B, G, K]
    if layer.head_norm is not None:
        query_key = layer.head_norm(query_key)
    if turns is not None:
        query_key = turns.turn(query_key, position)
    query, key = query_key.split([own.heads, own.kv_heads], dim=1)
    cache.keys.select(2, position).copy_(key)
    cache.values.select(2, position).copy_(value)
    # Heads that share keys are so many queries of one head.
    mixed = F.scaled_dot_product_attention(
        query.unflatten(1, (own.kv_heads, -1)),
        cache.keys.narrow(2, 0, end),
        cache.values.narrow(2, 0, end),
        attn_mask=None if layer.bias is None else layer.bias[position : position + 1, :end],
        scale=own.scale,
    )
    return mixed.reshape(x_BD.shape)


def _hidden(mlp: SwiGLU | GELU, x_BD: Tensor) -> Tensor:
    if isinstance(mlp, GELU):
        return F.gelu(_product(mlp.hidden.weight, x_BD))
    gate, value = _product(mlp.gate_value.weight, x_BD).chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def _product(weight_OD: Tensor, x_BD: Tensor) -> Tensor:
    """x W^T, [B, O]. On CPUs in float32 as (W x^T)^T, for whose shapes MKL has kernels that keep up with memory.

    It has none for a single row, which is therefore taken twice. All matrices of a model of 28 MB on a busy machine,
    2 threads, best of 25: 1 row 3.7 ms as x W^T, 1.5 so; 2 rows 6.3 and 1.5; 8 rows 6.7 and 3.1; 16 rows 6.8 and 3.6.
    """
    if weight_OD.device.type != "cpu" or weight_OD.dtype != torch.float32:
        return F.linear(x_BD, weight_OD)
    if len(x_BD) == 1:
        return torch.mm(weight_OD, torch.cat([x_BD, x_BD]).t())[:, :1].t()
    return torch.mm(weight_OD, x_BD.contiguous().t()).t()


def _one_position(norm: nn.Module) -> Norm:
    return _fast_rms(norm.weight, norm.eps) if isinstance(norm, RMSNorm) else norm


def _of_heads(attention: Attention) -> Norm | None:
    """QK-norm of the queries and keys of all heads at once."""
    query, key = attention.query_norm, attention.key_norm
    if not isinstance(query, RMSNorm) or not isinstance(key, RMSNorm):
        return None
    weights = [query.weight.expand(attention.heads, -1), key.weight.expand(attention.kv_heads, -1)]
    return _fast_rms(torch.cat(weights), query.eps)


def _fast_rms(weight: Tensor, eps: float | None) -> Norm:
    """RMSNorm over the last of x's dimensions, on CPUs in four operations: sqrt(D) x * weight / sqrt(|x|² + D eps).

    PyTorch has no fused RMSNorm there: its parts take twice as long (21 µs against 11 for one row of 256).
    """
    width = weight.shape[-1]
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, (width,), None, eps) * weight
    scaled = weight * width**0.5
    floor = weight.new_tensor((width * (eps or 0.0)) ** 0.5)

    def norm(x: Tensor) -> Tensor:
        return torch.mul(x, scaled).div_(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor))

    return norm
