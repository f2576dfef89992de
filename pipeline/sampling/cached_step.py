"""The decode step for CPUs: one code through the transformer with as few operations as it takes.

The same as `decode_step.ModelStep`, the reference. At one position per row, what an operation costs to start outweighs
what it computes (1 to 5 µs each on a CPU), and a view costs as much as a sum. So this step spends one operation where
the general form takes five, and writes into a `_Workspace` whose views are made once.
`tests/sampling/test_cached_step.py` holds it to the full pass at every position of every shape, and to the reference.

Shapes: B rows, C = max(B, 2) rows of which the second may be a copy, D width, M hidden width of the MLP, H heads,
G heads of keys and values, K = D / H, E = (H + 2 G) K. Names ending in CD are stored row by row, in DC by column.

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
    """A `DecodeStep` over one cache, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        layout, self._batch = model.layout, len(cache[0].keys)
        ends = [slice(o, o + n.codebook_size) for o, n in zip(layout.level_offsets, layout.levels, strict=True)]
        levels = [layout.level_at(index) for index in range(layout.image_length)]
        embeddings, heads = [model.embedding.weight[s] for s in ends], [model.head.weight[s] for s in ends]
        self._embeddings, self._heads = [embeddings[level] for level in levels], [heads[level] for level in levels]
        grids = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
        self._code_positions = torch.cat(grids).unbind() if grids else None
        self._first = layout.text_length + 1
        self._rotary = None
        if model.shape.positions == "rotary":
            angles = rotary_angles(layout, model.shape.head_width, model.embedding.weight.device)
            self._rotary = RotaryTable.from_angles(angles, cache[0].keys.dtype)
        self._layers = [_Layer.build(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm, self._workspace = _norm(model.norm), _Workspace(self._layers[0], self._batch)

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        """float32 [B, V]."""
        self._workspace.mixed_CD.copy_(hidden_BD)
        logits_VC = torch.mm(self._heads[index], self._workspace.mixed_DC)
        return logits_VC[:, : self._batch].t().float().contiguous()

    def read(self, code_B: Tensor, index: int) -> Tensor:
        """[B, D], which the next `read` overwrites."""
        x_CD = self._embeddings[index].index_select(0, code_B.expand(len(self._workspace.mixed_CD)))
        if self._code_positions is not None:
            x_CD += self._code_positions[index]
        _run_layers(self._layers, self._rotary, x_CD, self._first + index, self._workspace)
        self._norm(x_CD, self._workspace.normed_CD)
        return self._workspace.normed_CD[: self._batch]


@dataclass
class _Layer:
    """A block and its cache, with norms that suit one position."""

    attention: Attention
    mlp: SwiGLU | GELU
    attention_norm: Norm
    qk_norm: Norm | None  # queries and keys together
    mlp_norm: Norm
    bias: Tensor | None  # for a sparse pattern, [S, S]: 0 where row sees column, else -inf
    cache: LayerCache

    @classmethod
    def build(cls, model: Transformer, block: nn.Module, cache: LayerCache) -> _Layer:
        assert isinstance(block, Block)
        own = block.attention
        bias = None if own.pattern == "full" else model.tables.bias(own.pattern, cache.keys.dtype)
        return cls(own, block.mlp, _norm(block.attention_norm), _qk_norm(own), _norm(block.mlp_norm), bias, cache)

    @property
    def mlp_in(self) -> Tensor:
        return (self.mlp.hidden if isinstance(self.mlp, GELU) else self.mlp.gate_value).weight


class _Workspace:
    """The tensors that a layer writes its results into, and views of them; all layers share one."""

    def __init__(self, layer: _Layer, batch: int) -> None:
        own, rows = layer.attention, max(batch, 2)
        new = own.qkv.weight.new_empty
        (qkv_width, width), up_width, hidden = own.qkv.weight.shape, len(layer.mlp_in), layer.mlp.out.weight.shape[1]
        self.normed_CD, self.mixed_CD, self.hidden_CM = new(rows, width), new(rows, width), new(rows, hidden)
        self.normed_DC, self.mixed_DC, self.hidden_MC = self.normed_CD.t(), self.mixed_CD.t(), self.hidden_CM.t()
        self.qkv_EC, self.out_DC, self.up_MC = new(qkv_width, rows), new(width, rows), new(up_width, rows)
        self.out_CD, self.up_CM = self.out_DC.t(), self.up_MC.t()
        self.gate_CM, self.value_CM = self.up_CM[:, :hidden], self.up_CM[:, -hidden:]
        heads, with_keys = own.heads, own.heads + own.kv_heads
        qkv = self.qkv_EC[:, :batch].t().unflatten(1, (-1, own.head_width))  # [B, H + 2 G, K]
        self.projected, self.value = qkv[:, :with_keys], qkv[:, with_keys:]
        self.query_key = new(batch, with_keys, own.head_width)  # normed and rotated
        self.query, self.key = self.query_key[:, :heads].unflatten(1, (own.kv_heads, -1)), self.query_key[:, heads:]


def _run_layers(
    layers: list[_Layer], rotary: RotaryTable | None, x_CD: Tensor, position: int, workspace: _Workspace
) -> None:
    """All blocks, in place."""
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


def _attend(layer: _Layer, rotary: RotaryTable | None, position: int, workspace: _Workspace) -> None:
    """Attention at one position over what its pattern shows of the cache, into `workspace.mixed_CD`."""
    own, cache, end = layer.attention, layer.cache, position + 1
    torch.mm(own.qkv.weight, workspace.normed_DC, out=workspace.qkv_EC)
    if layer.qk_norm is not None:
        layer.qk_norm(workspace.projected, workspace.query_key)
    else:
        workspace.query_key.copy_(workspace.projected)
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


def _qk_norm(attention: Attention) -> Norm | None:
    """QK-norm of the queries and keys of all heads in one call; None where the model has none."""
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
