"""The decode step for GPUs: tensors of the same shape at every position, so that one CUDA graph fits many of them.

The same as `decode_step.ModelStep`, the reference, with the position as a tensor on the device: the cache has its whole
length from the start, and what is not written yet is masked. So nothing in a step depends on Python's numbers but the
level, whose codebook has its own size, and how far attention looks (`end`). `tests/sampling/test_static_step.py` holds
it to the full pass and to the codes of the reference.

Shapes: B rows, D width, H heads, G heads of keys and values, K = D / H, S positions, N codes of all levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.transformer.attention import LayerCache, attend_last
from pipeline.transformer.attention_patterns import Pattern
from pipeline.transformer.blocks import Block
from pipeline.transformer.model import Cache, Transformer
from pipeline.transformer.rotary import rotary_angles

# A cache's length is a multiple of this: kernels of attention want masks so, or pad them once a layer.
_CACHE_MULTIPLE = 64
# Attention looks at what is written, rounded up to a multiple of this: every multiple is a graph of its own.
_STRETCH = 256


def static_length(positions: int) -> int:
    """How long the cache of `StaticStep` is for sequences of `positions`."""
    return -(-positions // _CACHE_MULTIPLE) * _CACHE_MULTIPLE


class StaticStep:
    """A `DecodeStep` that reads codes in order, from code `start` on.

    Attributes:
        index: of the code that is drawn next, int64 [1]; `read` moves it on.
    """

    def __init__(self, model: Transformer, cache: Cache, start: int, compiled: bool = False) -> None:
        """`cache` has `static_length` positions, of which text and `start` codes are there.

        `compiled`: through `torch.compile`, which takes its time at the first code.
        """
        layout, device, dtype = model.layout, model.head.weight.device, cache[0].keys.dtype
        self._model, self._first, self._compiled = model, layout.text_length + 1, compiled
        self.index = torch.full((1,), start, device=device)
        self._length = cache[0].keys.shape[2]
        self._positions = torch.arange(self._length, device=device)
        grids = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
        self._code_positions = torch.cat(grids) if grids else None  # [N, D]
        self._rotary = None
        if model.shape.positions == "rotary":
            self._rotary = _cosine_sine(rotary_angles(layout, model.shape.head_width, device), dtype)
        self._layers = []
        for block, own in zip(model.blocks, cache, strict=True):
            assert isinstance(block, Block)
            own.keys[:, :, self._first + start :].zero_()  # memory as it comes may hold NaNs, which no mask hides
            own.values[:, :, self._first + start :].zero_()
            self._layers.append(_Layer(block, own))
        patterns: set[Pattern] = {layer.block.attention.pattern for layer in self._layers}
        self._bias = {pattern: _bias(model, pattern, self._length, dtype) for pattern in sorted(patterns - {"full"})}
        self._no_bias = torch.zeros((1, self._length), device=device, dtype=dtype) if "full" in patterns else None
        self._run = torch.compile(_run_layers) if compiled else _run_layers

    def end(self, index: int) -> int:
        """How many positions attention looks at when code `index` is read; a graph serves all codes that share it."""
        if self._compiled:  # each one would be compiled anew
            return self._length
        written = self._first + index + 1
        return min(-(-written // _STRETCH) * _STRETCH, self._length)

    def level(self, index: int) -> int:
        """The level of code `index`."""
        return self._model.layout.level_at(index)

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        return self._model.level_logits(hidden_BD, self.level(index)).float()

    def read(self, code_B: Tensor, index: int) -> Tensor:
        layout, end = self._model.layout, self.end(index)
        level = self.level(index)
        offset, size = layout.level_offsets[level], layout.levels[level].codebook_size
        x_BD = F.embedding(code_B, self._model.embedding.weight[offset : offset + size])
        if self._code_positions is not None:
            x_BD = x_BD + self._code_positions.index_select(0, self.index)
        position = self.index + self._first
        rotary = None if self._rotary is None else self._rotary.index_select(1, position)
        masks: dict[str, Tensor] = {p: bias[:, :end].index_select(0, position) for p, bias in self._bias.items()}
        if self._no_bias is not None:
            masks["full"] = self._no_bias[:, :end].masked_fill(self._positions[:end] > position, float("-inf"))
        x_BD = self._run(self._layers, x_BD, position, rotary, masks)
        self.index += 1
        hidden: Tensor = self._model.norm(x_BD)
        return hidden


@dataclass
class _Layer:
    block: Block
    cache: LayerCache


def _run_layers(
    layers: Sequence[_Layer], x_BD: Tensor, position: Tensor, rotary: Tensor | None, masks: Mapping[str, Tensor]
) -> Tensor:
    """All blocks at one position. `masks`, for each pattern, is added to the scores: [1, positions looked at]."""
    for layer in layers:
        block = layer.block
        mask = masks[block.attention.pattern]
        x_BD = x_BD + _attend(layer, block.attention_norm(x_BD), position, rotary, mask)
        x_BD = x_BD + block.mlp(block.mlp_norm(x_BD))
    return x_BD


def _attend(layer: _Layer, x_BD: Tensor, position: Tensor, rotary: Tensor | None, mask: Tensor) -> Tensor:
    own, cache = layer.block.attention, layer.cache
    qkv = own.qkv(x_BD).unflatten(1, (-1, own.head_width))  # [B, H + 2 G, K]
    query_key, value = qkv.split([own.heads + own.kv_heads, own.kv_heads], dim=1)
    if not isinstance(own.query_norm, nn.Identity):
        query, key = query_key.split([own.heads, own.kv_heads], dim=1)
        query_key = torch.cat([own.query_norm(query), own.key_norm(key)], dim=1)
    if rotary is not None:
        cosine, sine = rotary
        swapped = query_key.roll(own.head_width // 2, -1)
        query_key = torch.addcmul(query_key * cosine, swapped, sine)
    query, key = query_key.split([own.heads, own.kv_heads], dim=1)
    cache.keys.index_copy_(2, position, key[:, :, None])
    cache.values.index_copy_(2, position, value[:, :, None])
    end = mask.shape[-1]
    grouped = query.unflatten(1, (own.kv_heads, -1))  # [B, G, H / G, K]
    mixed = attend_last(grouped, cache.keys[:, :, :end], cache.values[:, :, :end], own.scale, mask)
    out: Tensor = own.out(mixed.reshape(len(x_BD), -1))
    return out


def _cosine_sine(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """What a head's halves and its swapped halves are multiplied by: [2, S, K], of angles [S, K / 2]."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], 1), torch.cat([-sine, sine], 1)]).to(dtype)


def _bias(model: Transformer, pattern: Pattern, length: int, dtype: torch.dtype) -> Tensor:
    """The pattern to add to scores, [S, length]: 0 where row sees column, else minus infinity."""
    bias = model.tables.bias(pattern, dtype)
    return F.pad(bias, (0, length - bias.shape[1]), value=float("-inf"))
