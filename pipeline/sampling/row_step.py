"""The decode step for rows that stand at different codes: what a server needs, whose requests come and go.

    step = RowStep(model, slots=16)                       # with a cache of so many rows
    hidden = step.read_prompts(texts, given, slots)       # any number of prompts in one pass
    logits = step.logits(hidden, level)                   # of rows that draw a code of one level
    hidden = step.read(codes, [3, 3, 0, 17])              # each row's own code, at its own index

What a row gets does not depend on who else is there, to the bit: its products are those of `row_products.py`; norms,
sums and rotations round each number by itself; SiLU and GELU, which a processor's vector unit rounds in another way
than its scalar one, are taken of a fixed cut of a row. And its attention looks at a window of the cache that follows
from its own position, with a mask, so that rows at different positions share a call. On CPUs whose products are not
seen to round alike, rows and prompts go through one by one. `tests/sampling/test_row_batch.py` holds all that.

As in `cached_step.py`, what an operation costs to start outweighs what it computes. So views of the cache are kept, and
an RMSNorm is two operations: rows carry a last number, sqrt(D eps), so that their length is the norm's divisor; its
weight and sqrt(D) are in the matrix behind it, whose last column is zero, and so is the last row of those that add to
the rows.

Shapes: B rows, P prompts, M rows of a product (B, or all positions of the P prompts), D width, H heads, G heads of
keys, R = H / G, K head width, W = D + 1 or with LayerNorm D, E = (H + 2 G) K, T text positions, n given codes, V codes,
L positions, S of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.sampling.cached_step import code_positions, level_weights
from pipeline.sampling.row_products import RowProduct
from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.attention import Attention, Turn, attend, attend_last
from pipeline.transformer.attention_patterns import Pattern
from pipeline.transformer.blocks import GELU, Block
from pipeline.transformer.model import Transformer
from pipeline.transformer.norms import RMSNorm
from pipeline.transformer.rotary import rotate
from pipeline.transformer.tables import Tables

WINDOW = 128  # positions of the cache: more of them, fewer calls, but more scores that count for nothing
_IN_ONE_THREAD = 2**15 - 1  # numbers of an operation on CPUs; more are cut anywhere
_READ_AT_ONCE = 2**12  # positions of prompts
Norm = Callable[[Tensor], Tensor]


class RowStep:
    """A model and a cache, for as long as the weights are not replaced. On CPUs it holds a copy of its matrices."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, slots: int) -> None:
        layout, weight = model.layout, model.head.weight
        levels = [layout.level_at(index) for index in range(layout.image_length)]
        self._layout, self._tables, self._embedding = layout, model.tables, model.embedding.weight
        self._offsets = [layout.level_offsets[level] for level in levels]  # of a code in the one vocabulary
        self._first, self._length = layout.text_length + 1, layout.length  # code 0's position, and L
        codes = code_positions(model)
        text = None if model.text_position is None else model.text_position.weight
        self._positions = None if codes is None or text is None else torch.cat([text, codes])  # [1 + T + N, D]
        self._rotary = model.tables.rotary(0, self._length, weight.dtype) if self._positions is None else None
        self._layers = [_Layer.build(block, slots, self._length) for block in model.blocks]
        self._norm, self._floor = _norm_of(model.norm), _floor_of(model.norm)
        self._heads = [RowProduct(_behind(model.norm, head)) for head in level_weights(model)[1]]
        self._masks: dict[int, dict[Pattern, Tensor]] = {}
        self._patterns = {layer.pattern for layer in self._layers}
        products = [product for layer in self._layers for product in layer.products] + self._heads
        self._together = weight.device.type != "cpu" or all(product.rounds_alike for product in products)

    @property
    def width(self) -> int:
        """W, of what `read` returns."""
        return self._embedding.shape[1] + (self._floor is not None)

    def logits(self, hidden_BW: Tensor, level: int) -> Tensor:
        """What predicts the next code, of `level`: float32 [B, V]."""
        if self._together:
            return self._heads[level](hidden_BW).float()
        return torch.cat([self._heads[level](row) for row in hidden_BW.split(1)]).float()

    def read(self, codes: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Put code `indices[row]` of the N into the cache's row, for its first B rows; [B, W], for `logits`."""
        ids = [code + self._offsets[index] for code, index in zip(codes, indices, strict=True)]
        at = [self._first + index for index in indices]
        if self._together:
            return self._read(ids, at, 0)
        return torch.cat([self._read(ids[row : row + 1], at[row : row + 1], row) for row in range(len(ids))])

    def _read(self, ids: list[int], at: list[int], first: int) -> Tensor:
        """The same of what has `ids` in the one vocabulary, into the rows from `first` on."""
        written = [row * self._length + position for row, position in enumerate(at, first)]  # of the flat cache
        ids_B, position_B, written_B = torch.tensor([ids, at, written]).to(self._embedding.device)
        x_BW, turn = self._embedded(ids_B, position_B), self._turn(position_B)
        windows = self._windows(at, position_B, first)
        for layer in self._layers:
            qkv = layer.projected(x_BW, turn)
            layer.flat_cache.index_copy_(0, written_B, qkv[:, layer.query_width :])
            layer.after_attention(x_BW, layer.attend(qkv, windows))
        return self._norm(x_BW)

    def read_prompts(self, text_PT: Tensor, given_Pn: Tensor, slots: Sequence[Sequence[int]]) -> Tensor:
        """Read texts and first codes into the cache, each into all rows of its `slots`; [P, W], for the logits of code
        n."""
        length = self._first + given_Pn.shape[1]
        at_once = max(_READ_AT_ONCE // length, 1) if self._together else 1
        hidden = []
        for start in range(0, len(text_PT), at_once):
            own = slice(start, start + at_once)
            hidden.append(self._read_prompts(text_PT[own], given_Pn[own], slots[own]))
        return torch.cat(hidden)

    def _read_prompts(self, text_PT: Tensor, given_Pn: Tensor, slots: Sequence[Sequence[int]]) -> Tensor:
        prompts, device = len(text_PT), text_PT.device
        words_PT = torch.where(text_PT == PAD_ID, self._tables.pad_ids, text_PT)
        codes_Pn = given_Pn + self._tables.code_offsets[: given_Pn.shape[1]]
        ids_PS = torch.cat([text_PT.new_full((prompts, 1), self._layout.start_id), words_PT, codes_Pn], dim=1)
        length = ids_PS.shape[1]
        position_M = torch.arange(length, device=device).repeat(prompts)
        x_MW, turn = self._embedded(ids_PS.flatten(), position_M), self._turn(position_M)
        rows = torch.tensor([slot for own in slots for slot in own], device=device)
        prompt_of_row = torch.tensor([i for i, own in enumerate(slots) for _ in own], device=device)
        for layer in self._layers:
            qkv = layer.projected(x_MW, turn)
            keys_values = qkv[:, layer.query_width :].unflatten(0, (prompts, length))
            layer.cache[rows, :length] = keys_values[prompt_of_row]
            layer.after_attention(x_MW, layer.attend_within(qkv, prompts, self._tables))
        return self._norm(x_MW.unflatten(0, (prompts, length))[:, -1])

    def keep(self, slots: Sequence[int]) -> None:
        """Move these rows of the cache to its beginning."""
        if list(slots) != list(range(len(slots))):
            for layer in self._layers:
                layer.cache[: len(slots)] = layer.cache[list(slots)]

    def _embedded(self, ids_M: Tensor, position_M: Tensor) -> Tensor:
        x_MD = self._embedding.index_select(0, ids_M)
        if self._positions is not None:
            x_MD += self._positions.index_select(0, position_M)
        return x_MD if self._floor is None else torch.cat([x_MD, self._floor.expand(len(x_MD), 1)], dim=1)

    def _turn(self, position_M: Tensor) -> Turn | None:
        return None if self._rotary is None else (self._rotary[0][position_M], self._rotary[1][position_M])

    def _windows(self, at: Sequence[int], position_B: Tensor, first: int) -> list[_Window]:
        """Stretches of rows whose positions `at` lie in one window of the cache."""
        found, start = [], 0
        for end, members in groupby(min((position // WINDOW + 1) * WINDOW, self._length) for position in at):
            stop = start + len(list(members))
            tables, own = self._tables_to(end), position_B[start:stop]
            masks = {pattern: table.index_select(0, own) for pattern, table in tables.items()}
            found.append(_Window(start, stop, first, end, masks))
            start = stop
        return found

    def _tables_to(self, end: int) -> dict[Pattern, Tensor]:
        """By pattern, what is added to the scores of each position over those before `end`: [L, 1, 1, end]."""
        if end not in self._masks:
            biases = {pattern: self._tables.bias(pattern, self._embedding.dtype) for pattern in self._patterns}
            self._masks[end] = {pattern: bias[:, None, None, :end] for pattern, bias in biases.items()}
        return self._masks[end]


@dataclass(frozen=True)
class _Window:
    """Rows `start` to `stop` of a batch, which is in the cache from row `first` on, look at positions before `end`."""

    start: int
    stop: int
    first: int
    end: int
    masks: dict[Pattern, Tensor]  # [rows, 1, 1, end]


@dataclass
class _Layer:
    """A block and its cache: of a position all keys, then all values, [rows, L, 2 G K]."""

    cache: Tensor
    attention: Attention
    qkv: RowProduct
    out: RowProduct
    mlp_in: RowProduct
    mlp_out: RowProduct
    attention_norm: Norm
    mlp_norm: Norm
    activated: Callable[[Tensor], Tensor]
    _views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def build(cls, block: nn.Module, slots: int, length: int) -> _Layer:
        assert isinstance(block, Block)
        own, mlp = block.attention, block.mlp
        mlp_in, activated = (mlp.hidden, _gelu) if isinstance(mlp, GELU) else (mlp.gate_value, _swiglu)
        return cls(
            own.qkv.weight.new_zeros(slots, length, 2 * own.kv_heads * own.head_width),
            own,
            RowProduct(_behind(block.attention_norm, own.qkv.weight)),
            RowProduct(_before(block.mlp_norm, own.out.weight)),
            RowProduct(_behind(block.mlp_norm, mlp_in.weight)),
            RowProduct(_before(block.mlp_norm, mlp.out.weight)),
            _norm_of(block.attention_norm),
            _norm_of(block.mlp_norm),
            activated,
        )

    def __post_init__(self) -> None:
        own = self.attention
        self.products = [self.qkv, self.out, self.mlp_in, self.mlp_out]
        self.flat_cache = self.cache.flatten(0, 1)
        self.pattern, self.query_width = own.pattern, own.heads * own.head_width
        self._by_head = (own.heads + 2 * own.kv_heads, own.head_width)
        self._query = (own.kv_heads, own.heads // own.kv_heads, own.head_width)
        self._query_strides = (self._query[1] * own.head_width, own.head_width, 1)
        self._norms = [norm for norm in (own.query_norm, own.key_norm) if isinstance(norm, RMSNorm)]

    def projected(self, x_MW: Tensor, turn: Turn | None) -> Tensor:
        """Queries, keys and values, normed and rotated: [M, E]."""
        qkv, own = self.qkv(self.attention_norm(x_MW)), self.attention
        if not self._norms and turn is None:
            return qkv
        query_key = qkv.unflatten(1, self._by_head)[:, : own.heads + own.kv_heads]
        if self._norms:
            for part, norm in zip(query_key.split([own.heads, own.kv_heads], dim=1), self._norms, strict=True):
                part.copy_(_rms(part, norm))
        if turn is not None:
            query_key.copy_(rotate(query_key, *turn))
        return qkv

    def attend(self, qkv: Tensor, windows: Sequence[_Window]) -> Tensor:
        """Of one position a row over what is cached: [B, D]."""
        query = qkv.as_strided((len(qkv), *self._query), (qkv.shape[1], *self._query_strides))  # [B, G, R, K]
        if len(windows) == 1:
            return self._attend(query, windows[0])
        return torch.cat([self._attend(query[own.start : own.stop], own) for own in windows])

    def _attend(self, query: Tensor, window: _Window) -> Tensor:
        keys, values = self._seen(window.first + window.start, window.first + window.stop, window.end)
        return attend_last(query, keys, values, self.attention.scale, window.masks[self.pattern]).flatten(1)

    def _seen(self, start: int, stop: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows of the cache before a position: [rows, G, end, K] each."""
        if (start, stop, end) not in self._views:
            keys_values = self.cache[start:stop, :end].unflatten(2, (2, self.attention.kv_heads, -1))
            keys, values = keys_values.permute(2, 0, 3, 1, 4)
            self._views[start, stop, end] = keys, values
        return self._views[start, stop, end]

    def attend_within(self, qkv: Tensor, prompts: int, tables: Tables) -> Tensor:
        """Of all positions of `prompts` over themselves: [M, D]."""
        own = self.attention
        by_head = qkv.unflatten(1, self._by_head).unflatten(0, (prompts, -1)).transpose(1, 2)  # [P, H + 2 G, S, K]
        query, keys, values = by_head.split([own.heads, own.kv_heads, own.kv_heads], dim=1)
        mixed = attend(query, keys, values, own.scale, own.pattern, tables)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)

    def after_attention(self, x_MW: Tensor, mixed_MD: Tensor) -> None:
        """The rest of the block, in place."""
        x_MW += self.out(mixed_MD)
        x_MW += self.mlp_out(self.activated(self.mlp_in(self.mlp_norm(x_MW))))


def _norm_of(norm: nn.Module) -> Norm:
    """The norm of rows of W numbers; of RMSNorm what `_behind` leaves of it."""
    if not isinstance(norm, RMSNorm):
        return norm
    return lambda x_MW: x_MW / torch.linalg.vector_norm(x_MW, dim=-1, keepdim=True)


def _floor_of(norm: nn.Module) -> Tensor | None:
    """The last number of rows, [1, 1]; None where they have none."""
    if not isinstance(norm, RMSNorm):
        return None
    return norm.weight.new_full((1, 1), (norm.weight.shape[-1] * (norm.eps or 0.0)) ** 0.5)


def _behind(norm: nn.Module, weight: Tensor) -> Tensor:
    """A matrix that takes what a norm gives: [E, W]."""
    return F.pad(weight * norm.weight * weight.shape[1] ** 0.5, (0, 1)) if isinstance(norm, RMSNorm) else weight


def _before(norm: nn.Module, weight: Tensor) -> Tensor:
    """A matrix whose product is added to what a norm takes: [W, …]."""
    return F.pad(weight, (0, 0, 0, 1)) if isinstance(norm, RMSNorm) else weight


def _rms(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm of queries or keys, in operations that round alike everywhere (`hypot` does not)."""
    width = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(width * (norm.eps or 0.0)).sqrt_()
    return x / length * (norm.weight * width**0.5)


def _swiglu(up_ME: Tensor) -> Tensor:
    gate, value = up_ME.chunk(2, dim=-1)
    return _by_rows(F.silu, gate, _IN_ONE_THREAD // gate.shape[-1]).mul_(value)


def _gelu(up_ME: Tensor) -> Tensor:
    return _by_rows(F.gelu, up_ME, 1)  # which would see rows as one long row


def _by_rows(function: Callable[[Tensor], Tensor], x_ME: Tensor, rows: int) -> Tensor:
    """`function` of each number, of so many rows at a time on CPUs."""
    if x_ME.device.type != "cpu" or len(x_ME) <= max(rows, 1):
        return function(x_ME)
    return torch.cat([function(part) for part in x_ME.split(max(rows, 1))])
