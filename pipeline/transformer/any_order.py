"""The decoder whose image codes come in any order, after Li et al. 2025 (ARPG, arXiv 2503.10568).

The first half of the layers reads: causal self-attention over start, text, and codes in an order of their own, each
code at its own position. The second half asks: a query is an embedding of the part (text or level) that it asks for,
at the position that it asks for, and attends to what was read before its place. So place i of the order, which holds
one code, is asked for by position from all that came before, and one pass can ask for any number of codes.

    model = AnyOrderTransformer(layout, shape)
    text_logits, level_logits = model(text, codes)                       # in raster order, at each code's own place
    factors = model.hidden_and_head_weights(text, codes, order)          # in `order` (orders.py), place by place
    cache = model.new_cache(batch); model.read_text(text, cache)                          # sampling:
    hidden = model.read_and_ask(codes, their_positions, positions_asked_for, cache, codes_before)

Each asking layer makes keys and values of its own from what was read, where the paper shares one pair among them: so
there are as many parameters as in a raster model of the same shape, and the cache is as large.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention import LayerCache
from pipeline.transformer.blocks import Block
from pipeline.transformer.cross_blocks import CrossBlock, Turns
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import INIT_STD, Cache, Transformer, working_precision
from pipeline.transformer.norms import build_norm


class AnyOrderTransformer(Transformer):
    """Shapes: B batch, T text positions, N codes of all levels, S = T + N, D width.

    Positions of the sequence count as in `Layout`: 0 is the start token, i + 1 text i, T + 1 + p code p.
    """

    order = "any"

    def __init__(self, layout: Layout, shape: TransformerShape) -> None:
        super().__init__(layout, shape)
        self.queries = nn.Embedding(1 + len(layout.levels), shape.width)  # for text, and for each level
        self.memory_norm = build_norm(shape)
        nn.init.normal_(self.queries.weight, std=INIT_STD)

    def _make_block(self, layer: int) -> nn.Module:
        return super()._make_block(layer) if layer < self._reading else CrossBlock(self.shape)

    @property
    def _reading(self) -> int:
        """Layers that read."""
        return self.shape.layers - self.shape.layers // 2

    def _position_tables(self) -> list[nn.Parameter]:
        return [*super()._position_tables(), self.queries.get_parameter("weight")]

    def hidden_and_head_weights(
        self, text_BT: Tensor, codes_BN: Tensor, order_BN: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """As `Transformer.hidden_and_head_weights`, the codes' hidden states in `order`; None: raster order."""
        if order_BN is None:
            order_BN = self._raster(codes_BN.shape[1]).expand_as(codes_BN)
        first = self.layout.text_length + 1
        text_at = torch.arange(first, device=order_BN.device).expand(len(order_BN), -1)
        at_BS1 = torch.cat([text_at, order_BN + first], dim=1)
        read_BN = order_BN[:, :-1]
        embedded = self._embed_codes_at(codes_BN.gather(1, read_BN), read_BN)
        x_BSD = working_precision(torch.cat([self._embed_text(text_BT), embedded], dim=1))
        for block in self.blocks:
            assert isinstance(block, (Block, CrossBlock))
            block.attention.make_tables(self.tables, x_BSD.dtype)
        return self._factors(self.norm(self._layers(x_BSD, at_BS1[:, :-1], at_BS1[:, 1:])))

    def read_text(self, text_BT: Tensor, cache: Cache) -> Tensor:
        """Put start and text into the cache; returns the hidden state [B, D] that predicts code 0."""
        x_BSD, first = self._embed_text(text_BT), self.layout.text_length + 1
        at = self._raster(first + 1).expand(len(text_BT), -1)
        return self._cached(x_BSD, at[:, :-1], at[:, -1:], cache, 0)[:, 0]

    def read_codes(self, codes_Bn: Tensor, start: int, cache: Cache) -> Tensor:
        """Put codes `start` .. into the cache, in raster order; returns the hidden state that predicts the next."""
        at = start + self._raster(codes_Bn.shape[1] + 1).expand(len(codes_Bn), -1)
        return self.read_and_ask(codes_Bn, at[:, :-1], at[:, -1:], cache, start)[:, 0]

    def read_and_ask(
        self, codes_Bm: Tensor, positions_Bm: Tensor, asked_Bn: Tensor, cache: Cache, start: int
    ) -> Tensor:
        """Put m codes, 0 or more, into the cache, and ask for n: their hidden states [B, n, D], each from all that is
        there then.

        Args:
            codes_Bm: each level's own ids; in the order in which they come.
            positions_Bm, asked_Bn: which of the N codes they are.
            start: how many codes are in the cache, after the text.
        """
        first = self.layout.text_length + 1
        x_BmD = self._embed_codes_at(codes_Bm, positions_Bm)
        return self._cached(x_BmD, positions_Bm + first, asked_Bn + first, cache, first + start)

    def _cached(self, x_BmD: Tensor, read_at: Tensor, asked_at: Tensor, cache: Cache, start: int) -> Tensor:
        return self.norm(self._layers(working_precision(x_BmD), read_at, asked_at, cache, start))

    def _layers(
        self, x_BSD: Tensor, read_at_BS: Tensor, asked_at_BQ: Tensor, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """All layers, of what is read at positions of the sequence to what is asked for there: [B, Q, D]."""
        tables, turns = self.tables, None
        if self.shape.positions == "rotary":
            turns = Turns(*(tables.rotary_at(at, x_BSD.dtype) for at in (asked_at_BQ, read_at_BS)))
        caches: list[LayerCache | None] = list(cache) if cache is not None else [None] * len(self.blocks)
        layers = list(zip(self.blocks, caches, strict=True))
        if x_BSD.shape[1]:
            for block, own in layers[: self._reading]:
                x_BSD = block(x_BSD, tables, own, start, None if turns is None else turns.memory)
            x_BSD = self.memory_norm(x_BSD)
        asked_BQD = working_precision(self._embed_queries(asked_at_BQ))
        for block, own in layers[self._reading :]:
            asked_BQD = block(asked_BQD, x_BSD, tables, turns, own, start)
        return asked_BQD

    def _embed_queries(self, at_BQ: Tensor) -> Tensor:
        """What asks for the positions of the sequence `at`: [B, Q, D]."""
        part = torch.zeros_like(at_BQ)
        for start in self.layout.level_starts:
            part += at_BQ > self.layout.text_length + start
        embedded: Tensor = self.queries(part)
        if self.text_position is None:
            return embedded
        table = torch.cat([self.text_position.weight, self._code_positions(0, self.layout.image_length)])
        return embedded + table[at_BQ]

    def _embed_codes_at(self, codes_Bm: Tensor, positions_Bm: Tensor) -> Tensor:
        """Codes at these of the N positions: [B, m, D]."""
        embedded: Tensor = self.embedding(codes_Bm + self.tables.code_offsets[positions_Bm])
        if not len(self.rows):
            return embedded
        return embedded + self._code_positions(0, self.layout.image_length)[positions_Bm]

    def _raster(self, count: int) -> Tensor:
        return torch.arange(count, device=self.head.weight.device)
