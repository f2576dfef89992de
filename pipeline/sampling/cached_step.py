"""One code through the transformer: the step of the decode loop, with as few operations as it takes.

`Transformer.read_codes` says the same in the words of training. At one position a row, what an operation costs to
start outweighs what it computes (1 to 5 µs each on a CPU, more on a GPU), and a view costs as much as a sum. So this
step spends one operation where the general form takes five, and writes into a `_Workspace` whose views are made once.
`tests/sampling/test_cached_step.py` holds it to the full pass at every position of every shape.

Shapes: B rows, C = max(B, 2) rows of which the second may be a copy, D width, M hidden width of the MLP, H heads,
G heads of keys and values, K = D / H, E = (H + 2 G) K. `x_CD` is stored row by row, `x_DC` column by column.

A matrix product is W x^T with x row by row and the result column by column. For that MKL has kernels that keep up
with memory, and none for a single row, which is therefore taken twice. The 25 matrices (28 MB) of a model of 6 layers
of 256 in float32, 2 threads, median of 40: 1 row 3.9 ms as x W^T, 3.5 as a product with a vector, 1.1 taken twice;
4 rows 5.7 ms as x W^T, 1.3 so; 8 rows 4.4 and 2.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.transformer.attention import Attention, LayerCache, attend_last
from pipeline.transformer.blocks import GELU, Block, SwiGLU
from pipeline.transformer.model import Cache, Transformer
from pipeline.transformer.norms import RMSNorm
from pipeline.transformer.rotary import RotaryTable, rotary_angles

Norm = Callable[[Tensor, Tensor], object]  # of the first argument, into the second


class CachedDecoder:
    """Reads codes into a cache, one position at a time, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache, compiled: bool = False) -> None:
        """`compiled`: through `torch.compile`, which takes its time at the first code."""
        layout, self._batch = model.layout, len(cache[0].keys)
        ends = [slice(o, o + n.codebook_size) for o, n in zip(layout.level_offsets, layout.levels, strict=True)]
        levels = [layout.level_at(index) for index in range(layout.image_length)]
        embeddings, heads = [model.embedding.weight[s] for s in ends], [model.head.weight[s] for s in ends]
        self._embeddings, self._heads = [embeddings[level] for level in levels], [heads[level] for level in levels]
        places = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
        self._places = torch.cat(places).unbind() if places else None
        self._first = layout.text_length + 1
        self._rotary = None
        if model.shape.positions == "rotary":
            angles = rotary_angles(layout, model.shape.head_width, model.embedding.weight.device)
            self._rotary = RotaryTable.from_angles(angles, cache[0].keys.dtype)
        self._layers = [_Layer.of(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm, self._workspace = _norm(model.norm), _Workspace(self._layers[0], self._batch)
        self._compiled = torch.compile(_through, dynamic=True) if compiled else None

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        """What predicts code `index` of the N, over its level's codes: float32 [B, V]."""
        self._workspace.mixed_CD.copy_(hidden_BD)
        logits_VC = torch.mm(self._heads[index], self._workspace.mixed_DC)
        return logits_VC[:, : self._batch].t().float().contiguous()

    def read(self, code_B: Tensor, index: int) -> Tensor:
        """Put code `index` of the N into the cache; returns the hidden state [B, D] that predicts the next."""
        x_CD = self._embeddings[index].index_select(0, code_B.expand(len(self._workspace.mixed_CD)))
        if self._places is not None:
            x_CD += self._places[index]
        position = self._first + index
        if self._compiled is None:
            _through(self._layers, self._rotary, x_CD, position, self._batch, self._workspace)
        else:
            x_CD = self._compiled(self._layers, self._rotary, x_CD, position, self._batch)
        self._norm(x_CD, self._workspace.normed_CD)
        return self._workspace.normed_CD[: self._batch]


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
        return cls(own, block.mlp, _norm(block.attention_norm), _of_heads(own), _norm(block.mlp_norm), bias, cache)

    @property
    def mlp_in(self) -> Tensor:
        return (self.mlp.hidden if isinstance(self.mlp, GELU) else self.mlp.gate_value).weight


class _Workspace:
    """Where a layer puts its results, and the views that it takes of them. The same for all layers."""

    def __init__(self, layer: _Layer, batch: int) -> None:
        own, rows = layer.attention, max(batch, 2)
        new = own.qkv.weight.new_empty
        (qkv, width), (up, hidden) = own.qkv.weight.shape, (len(layer.mlp_in), layer.mlp.out.weight.shape[1])
        self.normed_CD, self.mixed_CD, self.hidden_CM = new(rows, width), new(rows, width), new(rows, hidden)
        self.normed_DC, self.mixed_DC, self.hidden_MC = self.normed_CD.t(), self.mixed_CD.t(), self.hidden_CM.t()
        self.qkv_EC, self.out_DC, self.up_MC = new(qkv, rows), new(width, rows), new(up, rows)
        self.out_CD, self.up_CM = self.out_DC.t(), self.up_MC.t()
        self.gate_CM, self.value_CM = self.up_CM[:, :hidden], self.up_CM[:, -hidden:]
        heads, turned = own.heads, own.heads + own.kv_heads
        made = self.qkv_EC[:, :batch].t().unflatten(1, (-1, own.head_width))  # [B, H + 2 G, K]
        self.made, self.value = made[:, :turned], made[:, turned:]
        self.query_key = new(batch, turned, own.head_width)
        self.query, self.key = self.query_key[:, :heads].unflatten(1, (own.kv_heads, -1)), self.query_key[:, heads:]


def _through(
    layers: list[_Layer],
    rotary: RotaryTable | None,
    x_CD: Tensor,
    position: int,
    batch: int,
    workspace: _Workspace | None = None,
) -> Tensor:
    """All blocks; changes `x_CD`, and returns it. Without a workspace it makes one, as torch.compile likes it."""
    workspace = workspace or _Workspace(layers[0], batch)
    for layer in layers:
        layer.attention_norm(x_CD, workspace.normed_CD)
        _attend(layer, rotary, position, workspace)
        torch.mm(layer.attention.out.weight, workspace.mixed_DC, out=workspace.out_DC)
        x_CD += workspace.out_CD
        layer.mlp_norm(x_CD, workspace.normed_CD)
        torch.mm(layer.mlp_in, workspace.normed_DC, out=workspace.up_MC)
        if isinstance(layer.mlp, GELU):
            workspace.hidden_CM.copy_(F.gelu(workspace.up_CM))
        else:
            torch.mul(F.silu(workspace.gate_CM), workspace.value_CM, out=workspace.hidden_CM)
        torch.mm(layer.mlp.out.weight, workspace.hidden_MC, out=workspace.out_DC)
        x_CD += workspace.out_CD
    return x_CD


def _attend(layer: _Layer, rotary: RotaryTable | None, position: int, workspace: _Workspace) -> None:
    """What the heads find at one position, which sees what its pattern shows of the cache: `workspace.mixed_CD`."""
    own, cache, end = layer.attention, layer.cache, position + 1
    torch.mm(own.qkv.weight, workspace.normed_DC, out=workspace.qkv_EC)
    if layer.head_norm is not None:
        layer.head_norm(workspace.made, workspace.query_key)
    else:
        workspace.query_key.copy_(workspace.made)
    if rotary is not None:
        rotary.apply_(workspace.query_key, position)
    cache.keys.select(2, position).copy_(workspace.key)
    cache.values.select(2, position).copy_(workspace.value)
    mask = None if layer.bias is None else layer.bias[position : position + 1, :end]
    keys, values = cache.keys.narrow(2, 0, end), cache.values.narrow(2, 0, end)
    mixed = attend_last(workspace.query, keys, values, own.scale, mask)
    workspace.mixed_CD.copy_(mixed.reshape(len(workspace.query), -1))


def _norm(norm: nn.Module) -> Norm:
    if isinstance(norm, RMSNorm):
        return _fast_rms(norm.weight, norm.eps)
    return lambda x, out: out.copy_(norm(x))


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
        return lambda x, out: torch.mul(F.rms_norm(x, (width,), None, eps), weight, out=out)
    scaled = weight * width**0.5
    floor = weight.new_tensor((width * (eps or 0.0)) ** 0.5)

    def norm(x: Tensor, out: Tensor) -> None:
        torch.mul(x, scaled, out=out).div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor))

    return norm
