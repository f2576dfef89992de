"""One code through the transformer: the step of the decode loop, with as few operations as it takes.

`Transformer.read_codes` says the same in the words of training. At one position a row, what an operation costs to
start outweighs what it computes (3 to 5 µs each on a CPU, more on a GPU), so this step prepares what all positions
share, and spends one operation where the general form takes five. `tests/sampling/test_step.py` holds it to the full
pass at every position. Models of other parts than those that it knows (`_fits`) are read by `Transformer.read_code`.

Shapes: B rows, D width, H heads, K = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.transformer.blocks import Attention, Block, LayerCache, RMSNorm, SwiGLU
from pipeline.transformer.model import Cache, Transformer

Norm = Callable[[Tensor], Tensor]


@dataclass
class _Layer:
    """A block and its cache, with norms that suit one position."""

    attention: Attention
    mlp: SwiGLU
    attention_norm: Norm
    query_norm: Norm
    key_norm: Norm
    mlp_norm: Norm
    cache: LayerCache


class CodeReader:
    """Reads codes into a cache, one position at a time, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache, compiled: bool = False) -> None:
        """`compiled`: through `torch.compile`, which takes its time at the first code."""
        layout = model.layout
        self._general = None if _fits(model) else (model, cache)
        if self._general:
            return
        self._embedding = model.embedding
        self._offsets = [layout.level_offsets[layout.level_at(i)] for i in range(layout.image_length)]
        places = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
        self._places = torch.cat(places)
        self._first = layout.text_length + 1
        self._layers = [_layer(b, c) for b, c in zip(model.blocks, cache, strict=True)]
        self._norm = _one_position(model.norm)
        self._through = torch.compile(_through, dynamic=True) if compiled else _through

    def read(self, code_B: Tensor, index: int) -> Tensor:
        """Put code `index` of the N into the cache; returns the hidden state [B, D] that predicts the next."""
        if self._general:
            model, general_cache = self._general
            return model.read_code(code_B, index, general_cache)
        x_BD = self._embedding(code_B + self._offsets[index]) + self._places[index]
        return self._norm(self._through(self._layers, x_BD, self._first + index))


def _fits(model: Transformer) -> bool:
    shape = model.shape
    parts = (shape.norm, shape.mlp, shape.positions, shape.attention, shape.key_value_heads, shape.base_head_width)
    return parts == ("rmsnorm", "swiglu", "learned", "full", shape.heads, None)


def _layer(block: nn.Module, cache: LayerCache) -> _Layer:
    assert isinstance(block, Block)
    attention = block.attention
    assert isinstance(block.mlp, SwiGLU)
    return _Layer(
        attention,
        block.mlp,
        _one_position(block.attention_norm),
        _one_position(attention.query_norm),
        _one_position(attention.key_norm),
        _one_position(block.mlp_norm),
        cache,
    )


def _through(layers: list[_Layer], x_BD: Tensor, position: int) -> Tensor:
    for layer in layers:
        x_BD = torch.addmm(x_BD, _attended(layer, x_BD, position), layer.attention.out.weight.t())
        gate, value = layer.mlp.gate_value(layer.mlp_norm(x_BD)).chunk(2, dim=-1)
        x_BD = torch.addmm(x_BD, F.silu(gate) * value, layer.mlp.out.weight.t())
    return x_BD


def _attended(layer: _Layer, x_BD: Tensor, position: int) -> Tensor:
    """What the heads have found at one position, which sees all that is cached: [B, D]."""
    attention, cache = layer.attention, layer.cache
    qkv = attention.qkv(layer.attention_norm(x_BD)).view(len(x_BD), 3, attention.heads, -1)
    query, key, value = qkv.unbind(1)  # [B, H, K] each
    cache.keys.select(2, position).copy_(layer.key_norm(key))
    cache.values.select(2, position).copy_(value)
    keys, values = cache.keys.narrow(2, 0, position + 1), cache.values.narrow(2, 0, position + 1)
    return F.scaled_dot_product_attention(layer.query_norm(query).unsqueeze(2), keys, values).reshape(x_BD.shape)


def _one_position(norm: nn.Module) -> Norm:
    """sqrt(D) x / sqrt(|x|² + D eps) * weight: RMSNorm in three operations.

    PyTorch has no fused RMSNorm on CPUs: there its parts take twice as long (21 µs against 11).
    """
    if not isinstance(norm, RMSNorm) or norm.weight is None or norm.weight.device.type != "cpu" or norm.eps is None:
        return norm
    width = norm.normalized_shape[-1]
    weight = norm.weight * width**0.5
    floor = weight.new_tensor((width * norm.eps) ** 0.5)

    def fast(x: Tensor) -> Tensor:
        return torch.mul(x, weight).div_(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor))

    return fast
