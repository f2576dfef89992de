"""The decode step for CPUs: one code through the transformer with as few operations as it takes.

The same as `decode_step.ModelStep`, the reference. At one position per row, what an operation costs to start outweighs
what it computes (1 to 5 µs each on a CPU), and a view costs as much as a sum. So this step spends one operation where
the general form takes five, and writes into a `Workspace` whose views are made once.
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
from functools import partial

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
        embeddings, heads = level_weights(model)
        levels = [layout.level_at(index) for index in range(layout.image_length)]
        self._embeddings, self._heads = [embeddings[level] for level in levels], [heads[level] for level in levels]
        positions = code_positions(model)
        self._code_positions = None if positions is None else positions.unbind()
        self._first = layout.text_length + 1
        self._rotary = rotary_table(model, cache[0].keys.dtype)
        self._layers = [Layer.build(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm = norm_of(model.norm)
        self._workspace = Workspace(self._layers[0], self._batch)

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
        position = self._first + index
        rotate = None if self._rotary is None else partial(self._rotary.apply_, position=position)
        run_layers(self._layers, x_CD, self._workspace, rotate, partial(attend_at, position))
        self._norm(x_CD, self._workspace.normed_CD)
        return self._workspace.normed_CD[: self._batch]


def level_weights(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """Embedding and head of each level's codes, [codebook size, D] each."""
    layout = model.layout
    ends = [slice(o, o + n.codebook_size) for o, n in zip(layout.level_offsets, layout.levels, strict=True)]
    return [model.embedding.weight[s] for s in ends], [model.head.weight[s] for s in ends]


def code_positions(model: Transformer) -> Tensor | None:
    """What is added to each code's embedding, [N, D]; None where positions are rotary."""
    grids = [(r[:, None] + c[None]).flatten(0, 1) for r, c in zip(model.rows, model.columns, strict=True)]
    return torch.cat(grids) if grids else None


def rotary_table(model: Transformer, dtype: torch.dtype) -> RotaryTable | None:
    """Of all positions; None where they are learned."""
    if model.shape.positions != "rotary":
        return None
    angles = rotary_angles(model.layout, model.shape.head_width, model.embedding.weight.device)
    return RotaryTable.from_angles(angles, dtype)


@dataclass
class Layer:
    """A block and its cache, with norms that suit one position."""

    attention: Attention
    mlp: SwiGLU | GELU
    attention_norm: Norm
    qk_norm: Norm | None  # queries and keys together
    mlp_norm: Norm
    bias: Tensor | None  # for a sparse pattern, [S, S]: 0 where row sees column, else -inf
    cache: LayerCache

    @classmethod
    def build(cls, model: Transformer, block: nn.Module, cache: LayerCache) -> Layer:
        assert isinstance(block, Block)
        own = block.attention
        bias = None if own.pattern == "full" else model.tables.bias(own.pattern, cache.keys.dtype)
        norms = norm_of(block.attention_norm), _qk_norm(own), norm_of(block.mlp_norm)
        return cls(own, block.mlp, *norms, bias, cache)

    @property
    def mlp_in(self) -> Tensor:
        return (self.mlp.hidden if isinstance(self.mlp, GELU) else self.mlp.gate_value).weight


class Workspace:
    """The tensors that a layer writes its results into for B rows, and views of them; all layers share one."""

    def __init__(self, layer: Layer, batch: int) -> None:
        own, columns = layer.attention, max(batch, 2)
        new = own.qkv.weight.new_zeros  # a row that fills up the columns is computed, too
        (qkv_width, width), up_width, hidden = own.qkv.weight.shape, len(layer.mlp_in), layer.mlp.out.weight.shape[1]
        self.normed_CD, self.mixed_CD, self.hidden_CM = new(columns, width), new(columns, width), new(columns, hidden)
        self.normed_DC, self.mixed_DC, self.hidden_MC = self.normed_CD.t(), self.mixed_CD.t(), self.hidden_CM.t()
        self.qkv_EC, self.out_DC, self.up_MC = new(qkv_width, columns), new(width, columns), new(up_width, columns)
        self.out_CD, self.up_CM = self.out_DC.t(), self.up_MC.t()
        self.gate_CM, self.value_CM = self.up_CM[:, :hidden], self.up_CM[:, -hidden:]
        by_head = self.qkv_EC.t()[:batch].unflatten(1, (-1, own.head_width))  # [B, H + 2 G, K]
        self.projected, self.value = by_head.tensor_split([own.heads + own.kv_heads], dim=1)
        self.query_key = new(self.projected.shape)  # normed and rotated
        query, self.key = self.query_key.tensor_split([own.heads], dim=1)
        self.query = query.unflatten(1, (own.kv_heads, -1))
        self.mixed_BD = self.mixed_CD[:batch]


def run_layers(
    layers: list[Layer],
    x_CD: Tensor,
    workspace: Workspace,
    rotate: Callable[[Tensor], object] | None,
    attend: Callable[[Layer, Workspace], object],
) -> None:
    """All blocks, in place.

    Args:
        rotate: turns `workspace.query_key` in place by its rows' positions.
        attend: puts keys and values into the cache, and attention over what is there into `workspace.mixed_BD`.
    """
    for layer in layers:
        layer.attention_norm(x_CD, workspace.normed_CD)
        torch.mm(layer.attention.qkv.weight, workspace.normed_DC, out=workspace.qkv_EC)
        if layer.qk_norm is not None:
            layer.qk_norm(workspace.projected, workspace.query_key)
        else:
            workspace.query_key.copy_(workspace.projected)
        if rotate is not None:
            rotate(workspace.query_key)
        attend(layer, workspace)
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


def attend_at(position: int, layer: Layer, workspace: Workspace) -> None:
    """Attention of all rows at one position over what its pattern shows of the cache, into `workspace.mixed_BD`."""
    own, cache, end = layer.attention, layer.cache, position + 1
    cache.keys.select(2, position).copy_(workspace.key)
    cache.values.select(2, position).copy_(workspace.value)
    mask = None if layer.bias is None else layer.bias[position : position + 1, :end]
    keys, values = cache.keys.narrow(2, 0, end), cache.values.narrow(2, 0, end)
    mixed = attend_last(workspace.query, keys, values, own.scale, mask)
    workspace.mixed_BD.copy_(mixed.reshape(len(workspace.mixed_BD), -1))


def norm_of(norm: nn.Module) -> Norm:
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
