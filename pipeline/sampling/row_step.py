"""The decode step for rows that stand at different codes: what a server needs, whose requests come and go.

    step = RowStep(model, cache)                          # a row of the cache for each row of the batch
    logits = step.logits(hidden, rows, level)             # of rows that draw a code of one level
    hidden = step.read(codes, [3, 3, 0, 17])              # each row's own code, at its own index

The step of `cached_step.py`, with two differences. Attention is computed for each stretch of neighbouring rows at one
position. And products are taken of `COLUMNS` rows at a time, filled up with others that nobody looks at: MKL rounds
the last bit of a product by how many columns it has (2 and 3 alike, 4 to 10, 12 and more, on AMD's processors), so
only a fixed number makes a row's bits its own. `tests/sampling/test_row_batch.py` holds both.

Shapes: B rows, C rows with those that fill up the last block, D width, G heads of keys, K head width, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


class RowStep:
    """Of B rows, for as long as neither weights nor cache are replaced."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        layout, device, self._batch = model.layout, model.head.weight.device, len(cache[0].keys)
        levels = torch.tensor([layout.level_at(index) for index in range(layout.image_length)])
        self._first, self._embedding = layout.text_length + 1, model.embedding.weight
        self._offsets = torch.tensor(layout.level_offsets)[levels].to(device)  # [N], of a code in the one vocabulary
        _, self._heads = level_weights(model)
        self._code_positions, self._rotary = code_positions(model), rotary_table(model, cache[0].keys.dtype)
        self._layers = [Layer.build(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm, self._workspace = norm_of(model.norm), Workspace(self._layers[0], self._batch, COLUMNS)
        self._rows = torch.arange(self._batch, device=device)

    def logits(self, hidden_BD: Tensor, rows: Sequence[int], level: int) -> Tensor:
        """What predicts the next code of `rows`, all of `level`: float32 [rows, V]. `hidden` is that of all rows."""
        head, workspace, count = self._heads[level], self._workspace, len(rows)
        own = hidden_BD if list(rows) == list(range(self._batch)) else hidden_BD[list(rows)]
        workspace.mixed_CD[:count] = own
        blocks = workspace.mixed_DC[: -(-count // COLUMNS)]
        return torch.cat([torch.mm(head, block).t() for block in blocks])[:count].float()

    def read(self, codes: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Put each row's code `indices[row]` of the N into the cache; [B, D], which the next `read` overwrites."""
        workspace = self._workspace
        fill = len(workspace.mixed_CD) - self._batch
        both = torch.tensor([[*codes, *[codes[0]] * fill], [*indices, *[indices[0]] * fill]])
        code_C, index_C = both.to(self._rows.device)
        x_CD = self._embedding.index_select(0, code_C + self._offsets[index_C])
        if self._code_positions is not None:
            x_CD += self._code_positions[index_C]
        position_C = index_C + self._first
        rotate = None
        if self._rotary is not None:
            turned = position_C[: len(workspace.query_key), None]
            cosine_C1K, sine_C1K = self._rotary.cosine[turned], self._rotary.sine[turned]
            rotate = partial(RotaryTable(cosine_C1K[None], sine_C1K[None]).apply_, position=0)
        stretches = _stretches(self._first, indices)
        if len(stretches) == 1:
            attend = partial(attend_at, stretches[0].position)
        else:
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
