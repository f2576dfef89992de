"""The decoder whose image codes come a level at a time, after Tian et al. 2024 (VAR, arXiv 2404.02905).

Start and text come first and are causal. Then each level has a query for each of its codes: the level's embedding, the
code's position, and what the coarser levels hold there. A query sees start, text, and the queries of all coarser levels
and of its own; so one pass gives all codes of a level, each from the coarser levels and without knowing the others.

What the coarser levels hold is summed up as the image tokenizer sums up vectors (section 3.2): the embeddings of each
level's codes, resized to the finest grid (bicubic), and their sum to the grid that asks (the area's mean). Here they
are embeddings of the transformer's own: it needs token arrays alone, of any tokenizer of several levels.

    model = NextScaleTransformer(layout, shape)
    text_logits, level_logits = model(text, codes)
    cache = model.new_cache(batch); model.read_text(text, cache); below = None            # sampling:
    hidden = model.read_level(level, below, cache); below = model.with_level(below, codes_of_level, level)

Shapes: B batch, T text positions, N codes of all levels, n codes of a level, D width, H and W the finest level's sides.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.transformer.attention_patterns import length_of
from pipeline.transformer.blocks import Block
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import INIT_STD, Cache, Transformer, working_precision


class NextScaleTransformer(Transformer):
    """Positions of the sequence count as in `Layout`: 0 is the start token, i + 1 text i, T + 1 + p code p's query.

    Raises:
        UserError: the layout has one level.
    """

    order = "scale"

    def __init__(self, layout: Layout, shape: TransformerShape) -> None:
        if len(layout.levels) < 2:
            raise UserError(
                "transformer.order scale: expected an image tokenizer of several levels (a multiscale or residual"
                " quantizer, or kind vqvae2), found one level: train such a one, or set order to any"
            )
        super().__init__(layout, shape)
        self.queries = nn.Embedding(len(layout.levels), shape.width)
        nn.init.normal_(self.queries.weight, std=INIT_STD)

    def _position_tables(self) -> list[nn.Parameter]:
        return [*super()._position_tables(), self.queries.get_parameter("weight")]

    def hidden_and_head_weights(self, text_BT: Tensor, codes_BN: Tensor) -> list[tuple[Tensor, Tensor]]:
        layout, below, asked = self.layout, None, [self._embed_text(text_BT)]
        parts = codes_BN.split([level.positions for level in layout.levels], dim=1)
        for level, codes_Bn in enumerate(parts):
            asked.append(self._embed_queries(level, below, len(codes_BN)))
            if level + 1 < len(parts):
                below = self.with_level(below, codes_Bn, level)
        x_BSD = working_precision(torch.cat(asked, dim=1))
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.make_tables(self.tables, x_BSD.dtype)
            x_BSD = block(x_BSD, self.tables)
        hidden, text = self.norm(x_BSD), layout.text_length  # at the last text token nothing is predicted
        return self._factors(torch.cat([hidden[:, :text], hidden[:, text + 1 :]], dim=1))

    def with_level(self, below_BHWD: Tensor | None, codes_Bn: Tensor, level: int) -> Tensor:
        """What levels 0 .. `level` hold, from what those before hold (None at level 0): [B, H, W, D]."""
        grid = self.layout.levels[level]
        embedded: Tensor = self.embedding(codes_Bn + self.layout.level_offsets[level])
        own_BHWD = _resized(embedded.unflatten(1, (grid.height, grid.width)), *self.tables.to_finest(level))
        return own_BHWD if below_BHWD is None else below_BHWD + own_BHWD

    def read_level(self, level: int, below_BHWD: Tensor | None, cache: Cache) -> Tensor:
        """Put the queries of a level into the cache, which must hold text and the levels before; returns the hidden
        states [B, n, D] that predict its codes.

        `below`: what the levels before hold (`with_level`); None at level 0.
        """
        start = self.layout.text_length + 1 + self.layout.level_starts[level]
        x_BnD = self._embed_queries(level, below_BHWD, len(cache[0].keys))
        return self.norm(self._through(x_BnD, cache, start))

    def read_codes(self, codes_Bn: Tensor, start: int, cache: Cache) -> NoReturn:
        """Not of this order: `read_level` takes a level at a time."""
        raise NotImplementedError("order scale reads levels, not codes: use read_level")

    read_window = read_codes

    @property
    def _cached_length(self) -> int:
        return length_of("levels", self.layout)

    def _embed_queries(self, level: int, below_BHWD: Tensor | None, batch: int) -> Tensor:
        """What asks for the codes of a level: [B, n, D]."""
        start, size = self._parts[level]
        which_n = torch.full((size,), level, device=self.head.weight.device)
        query_nD: Tensor = self.queries(which_n)
        if len(self.rows):
            query_nD = query_nD + self._code_positions(start, start + size)
        if below_BHWD is None:
            return query_nD.expand(batch, -1, -1)
        return query_nD + _resized(below_BHWD, *self.tables.from_finest(level)).flatten(1, 2)


def _resized(grid_BhwD: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, h, w, D] to [B, H, W, D] by `rows` [H, h] and `columns` [W, w]."""
    rows, columns = rows.to(grid_BhwD.dtype), columns.to(grid_BhwD.dtype)
    if rows.shape[0] != rows.shape[1]:
        grid_BhwD = (rows @ grid_BhwD.flatten(2)).unflatten(2, grid_BhwD.shape[2:])
    return columns @ grid_BhwD if columns.shape[0] != columns.shape[1] else grid_BhwD
