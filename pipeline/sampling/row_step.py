"""The decode step for rows that stand at different codes: what a server needs, whose requests come and go.

    step = RowStep(model, cache)                          # a row of the cache for each row of the batch
    logits = step.logits(hidden, rows, level)             # of rows that draw a code of one level
    hidden = step.read(codes, [3, 3, 0, 17])              # each row's own code, at its own index

The step of `cached_step.py`, with two differences. Attention is computed for each stretch of neighbouring rows at one
position. And products are taken of `COLUMNS` rows at a time, filled up with others that nobody looks at: MKL rounds
the last bit of a product by how many columns it has (2 and 3 alike, 4 to 10, 12 and more, on AMD's processors), so
only a fixed number makes a row's bits its own. Where `WIDE` columns were seen to round as `COLUMNS` do, of each of the
model's matrices on this machine, more rows than `COLUMNS` go through in such blocks. `tests/sampling/test_row_batch.py`
holds both.

Shapes: B rows, C rows with those that fill up the last block, D width, G heads of keys, K head width, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from pipeline.sampling.cached_step import (
    Layer,
    Workspace,
    attend_at,
    code_positions,
    level_weights,
    norm_of,
    rotary_table,
    run_layers,
)
from pipeline.transformer.attention import attend_last
from pipeline.transformer.model import Cache, Transformer
from pipeline.transformer.rotary import RotaryTable

COLUMNS = 4  # 1.3 ms of products for one row instead of 1.1 with 2 columns: the least that serves both 1 and 8 rows
WIDE = 8  # 8 images of 64 codes, 2 layers of 256, one thread: 176 ms of CPU time, 209 in blocks of 4 (medians)


class RowStep:
    """Of B rows, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        layout = model.layout
        levels = [layout.level_at(index) for index in range(layout.image_length)]
        self._first, self._embedding = layout.text_length + 1, model.embedding.weight
        self._offsets = [layout.level_offsets[level] for level in levels]  # of a code in the one vocabulary
        _, self._heads = level_weights(model)
        self._code_positions, self._rotary = code_positions(model), rotary_table(model, cache[0].keys.dtype)
        self._norm = norm_of(model.norm)
        self._wide = False
        self._use([Layer.build(model, block, own) for block, own in zip(model.blocks, cache, strict=True)])
        self._wide = self._rounds_alike()

    @torch.inference_mode()
    def _rounds_alike(self) -> bool:
        """Whether products of `WIDE` columns have the bits of those of `COLUMNS`, for each matrix of the step."""
        of_layers = [
            weight
            for layer in self._layers
            for weight in (layer.attention.qkv.weight, layer.attention.out.weight, layer.mlp_in, layer.mlp.out.weight)
        ]
        for weight in (*of_layers, *self._heads):
            number = torch.Generator().manual_seed(weight.shape[1])
            x_CD = torch.randn(WIDE, weight.shape[1], generator=number).to(weight)
            narrow = [torch.mm(weight, block.t()) for block in x_CD.split(COLUMNS)]
            if not torch.equal(torch.mm(weight, x_CD.t()), torch.cat(narrow, dim=1)):
                return False
        return True

    def of_rows(self, cache: Cache) -> RowStep:
        """The same step over other rows of the cache: what is made of weights alone is shared."""
        other = copy(self)
        other._use([replace(layer, cache=own) for layer, own in zip(self._layers, cache, strict=True)])
        return other

    def _use(self, layers: list[Layer]) -> None:
        self._layers, self._batch = layers, len(layers[0].cache.keys)
        self._columns = WIDE if self._wide and self._batch > COLUMNS else COLUMNS
        self._workspace = Workspace(layers[0], self._batch, self._columns)
        self._rows = torch.arange(self._batch, device=self._embedding.device)

    def logits(self, hidden_BD: Tensor, rows: Sequence[int], level: int) -> Tensor:
        """What predicts the next code of `rows`, all of `level`: float32 [rows, V]. `hidden` is that of all rows."""
        head, workspace, count = self._heads[level], self._workspace, len(rows)
        own = hidden_BD if list(rows) == list(range(self._batch)) else hidden_BD[list(rows)]
        workspace.mixed_CD[:count] = own
        blocks = workspace.mixed_DC[: -(-count // self._columns)]
        return torch.cat([torch.mm(head, block).t() for block in blocks])[:count].float()

    def read(self, codes: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Put each row's code `indices[row]` of the N into the cache; [B, D], which the next `read` overwrites."""
        workspace, rotate = self._workspace, None
        fill = len(workspace.mixed_CD) - self._batch
        ids = [code + self._offsets[index] for code, index in zip(codes, indices, strict=True)]
        x_CD = self._embedding.index_select(0, torch.tensor([*ids, *[ids[0]] * fill]).to(self._rows.device))
        stretches = _stretches(self._first, indices)
        if len(stretches) == 1:
            index, position = indices[0], stretches[0].position
            if self._code_positions is not None:
                x_CD += self._code_positions[index]
            if self._rotary is not None:
                rotate = partial(self._rotary.apply_, position=position)
            attend = partial(attend_at, position)
        else:
            index_C = torch.tensor([*indices, *[indices[0]] * fill]).to(self._rows.device)
            position_C = index_C + self._first
            if self._code_positions is not None:
                x_CD += self._code_positions[index_C]
            if self._rotary is not None:
                turned = position_C[: len(workspace.query_key), None]
                table = RotaryTable(self._rotary.cosine[turned][None], self._rotary.sine[turned][None])
                rotate = partial(table.apply_, position=0)
            attend = partial(_attend, stretches, self._rows, position_C[: self._batch])
        run_layers(self._layers, x_CD, workspace, rotate, attend)
        self._norm(x_CD, workspace.normed_CD)
        return workspace.normed_CD[: self._batch]


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring rows at one position."""

    rows: slice
    position: int


def _stretches(first: int, indices: Sequence[int]) -> list[_Stretch]:
    """Of rows at codes `indices`; `first` is code 0's position."""
    found, start = [], 0
    for index, members in groupby(indices):
        end = start + len(list(members))
        found.append(_Stretch(slice(start, end), first + index))
        start = end
    return found


def _attend(stretches: list[_Stretch], rows_B: Tensor, position_B: Tensor, layer: Layer, workspace: Workspace) -> None:
    """Attention of each row at its own position over what its pattern shows of the cache, into `mixed_BD`."""
    own, cache = layer.attention, layer.cache
    cache.keys[rows_B, :, position_B] = workspace.key
    cache.values[rows_B, :, position_B] = workspace.value
    for stretch in stretches:
        end, position = stretch.position + 1, stretch.position
        mask = None if layer.bias is None else layer.bias[position : position + 1, :end]
        keys, values = cache.keys[stretch.rows, :, :end], cache.values[stretch.rows, :, :end]
        mixed = attend_last(workspace.query[stretch.rows], keys, values, own.scale, mask)
        workspace.mixed_BD[stretch.rows] = mixed.flatten(1)
