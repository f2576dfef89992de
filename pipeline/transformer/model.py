"""The decoder of Ramesh et al. 2021 (section 2.2), over whole sequences and, with a cache, token by token.

    model = Transformer(layout, shape)
    text_logits, level_logits = model(text, codes)         # training: every position at once
    cache = model.new_cache(batch); hidden = model.read_text(text, cache)     # sampling: the prompt once,
    logits = model.level_logits(hidden, level)                                # then a code at a time
    hidden = model.read_code(code, index, cache)                              # or several: read_codes

Each part predicts only over its own vocabulary: text positions text, each level its codebook. That is
the softmax over the one vocabulary with the impossible ids masked, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.core.objective import ParameterGroup
from pipeline.core.pretrained import load_model, save_model
from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.attention import LayerCache
from pipeline.transformer.blocks import Block
from pipeline.transformer.layout import Layout
from pipeline.transformer.norms import build_norm
from pipeline.transformer.tables import Tables

Cache = list[LayerCache]
MODEL_TYPE = "smalti"  # what AutoModel knows it by (hf.py)
# In exports: AutoModel's error at a type that is not registered quotes it, and nothing else of us.
EXPORTED_TYPE = "smalti: first run `import pipeline.transformer.hf` (pip install smalti)"
INIT_STD = 0.02


class Transformer(nn.Module):
    """The decoder. Shapes: B batch, T text positions, N codes of all levels, S = T + N, D width."""

    order: ClassVar[Literal["raster", "any", "scale"]] = "raster"
    grouped: ClassVar[bool] = False  # whether codes come by digits: bit_groups.py

    def __init__(self, layout: Layout, shape: TransformerShape) -> None:
        super().__init__()
        if shape.order != self.order or (shape.code_groups > 1) != self.grouped:
            name, found = type(self).__name__, f"found {shape.order} with code_groups {shape.code_groups}"
            raise UserError(f"{name}: expected order {self.order}, {found}; load it with load_transformer")
        self.layout, self.shape = layout, shape
        self.ids = self._ids_of(layout)
        width, learned = shape.width, shape.positions == "learned"
        self.embedding = nn.Embedding(self.ids.vocab_size, width)
        self.text_position = nn.Embedding(layout.text_length + 1, width) if learned else None  # + 1: the start token
        self.rows = nn.ParameterList(torch.empty(level.height, width) for level in layout.levels if learned)
        self.columns = nn.ParameterList(torch.empty(level.width, width) for level in layout.levels if learned)
        self.blocks = nn.ModuleList(self._make_block(layer) for layer in range(shape.layers))
        self.norm = build_norm(shape)
        self.head = nn.Linear(width, self.ids.predictable, bias=False)
        self._parts = list(zip(layout.level_starts, (level.positions for level in layout.levels), strict=True))
        self._tables: Tables | None = None
        self.level_heads: list[nn.Module] | None = None  # in place of the head's rows of each level
        self.reset_parameters()

    def _ids_of(self, layout: Layout) -> Layout:
        """Whose ids are the rows of embedding and head."""
        return layout

    def _make_block(self, layer: int) -> nn.Module:
        return Block(self.shape, layer)

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); residual outputs smaller by sqrt(2 layers) (GPT-2); the head starts at zero.

        With `base_width`, muP for Adam (Yang et al. 2022, table 3): matrices inside the blocks start smaller by
        sqrt(base_width / width), and they and the head learn at base_width / width times the learning rate.
        """
        shape = self.shape
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
        for position in (*self.rows, *self.columns):
            nn.init.normal_(position, std=INIT_STD)
        for block in self.blocks:
            for out in ("attention.out.weight", "mlp.out.weight"):
                nn.init.normal_(block.get_parameter(out), std=INIT_STD / (2 * shape.layers) ** 0.5)
        nn.init.zeros_(self.head.weight)
        if shape.base_width:
            matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
            with torch.no_grad():
                for matrix in matrices:
                    matrix.mul_(shape.width_ratio**0.5)

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters once, in the module's order within a group.

        With `base_width` matrices inside the blocks and the head learn at `width_ratio` times the config's rate.
        """
        if self.shape.width_ratio == 1:
            return [ParameterGroup(list(self.parameters()), undecayed=self._position_tables())]
        scaled = {id(p) for p in self._scaled_parameters() if p.ndim == 2}
        return [
            ParameterGroup([p for p in self.parameters() if id(p) not in scaled], undecayed=self._position_tables()),
            ParameterGroup([p for p in self.parameters() if id(p) in scaled], self.shape.width_ratio),
        ]

    def _scaled_parameters(self) -> Iterable[Tensor]:
        """Those whose matrices learn at `width_ratio` times the config's rate."""
        return (*self.blocks.parameters(), self.head.weight)

    def _position_tables(self) -> list[nn.Parameter]:
        text = [self.text_position.weight] if self.text_position else []
        return [*text, *self.rows, *self.columns]

    @property
    def tables(self) -> Tables:
        """Constants on the device of the weights, made at first use there."""
        device = self.embedding.weight.device
        if self._tables is None or self._tables.device != device:
            self._tables = Tables(self.ids, self.shape, device)
        return self._tables

    def forward(self, text_BT: Tensor, codes_BN: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of every target: text [B, T, text vocabulary], and a [B, n, codebook] for each level.

        `text` holds ids of the text tokenizer (0: pad), `codes` each level's own ids without offsets.
        """
        factors = self.hidden_and_head_weights(text_BT, codes_BN)
        text_logits, *level_logits = [hidden @ weight.T for hidden, weight in factors]
        return text_logits, level_logits

    def hidden_and_head_weights(self, text_BT: Tensor, codes_BN: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The factors of the logits, for text and for each level: hidden states [B, n, D], weights [vocabulary, D].

        For a loss that never holds all logits (`cross_entropy.py`).
        """
        x_BSD = torch.cat([self._embed_text(text_BT), self._embed_codes(codes_BN)[:, :-1]], dim=1)
        x_BSD = working_precision(x_BSD)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.make_tables(self.tables, x_BSD.dtype)
            x_BSD = block(x_BSD, self.tables)
        return self._factors(self.norm(x_BSD))

    def _factors(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `hidden_and_head_weights` returns, of the hidden states of all targets [B, T + N, D]."""
        layout = self.ids
        lengths = [layout.text_length, *(level.positions for level in layout.levels)]
        vocabularies = [layout.text_vocab_size, *(level.codebook_size for level in layout.levels)]
        head = self.head.weight.to(hidden.dtype)
        return list(zip(hidden.split(lengths, dim=1), head.split(vocabularies), strict=True))

    def targets(self, codes_BN: Tensor) -> list[Tensor]:
        """What the factors of each level predict, of codes in the order in which they do: [B, n] each."""
        return list(codes_BN.split([level.positions for level in self.layout.levels], dim=1))

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits over the codes of `level`: [..., D] -> [..., codebook size]."""
        if self.level_heads is not None:
            logits: Tensor = self.level_heads[level](hidden)
            return logits
        offset = self.layout.level_offsets[level]
        return hidden @ self.head.weight[offset : offset + self.layout.levels[level].codebook_size].T

    def new_cache(self, batch: int, length: int | None = None) -> Cache:
        """An empty cache for `batch` sequences, in the dtype of the residual stream, a `LayerCache` per layer.

        It holds the first `length` positions; None: all.
        """
        size = (batch, self.shape.key_value_heads, length or self._cached_length, self.shape.head_width)
        dtype = working_precision(self.head.weight[:0]).dtype
        empty = [self.head.weight.new_empty(size, dtype=dtype) for _ in range(2 * self.shape.layers)]
        return [LayerCache(keys, values) for keys, values in zip(empty[::2], empty[1::2], strict=True)]

    @property
    def _cached_length(self) -> int:
        """Positions of a whole image in a cache."""
        return self.layout.length

    def read_text(self, text_BT: Tensor, cache: Cache) -> Tensor:
        """Put start and text into the cache; returns the hidden state [B, D] that predicts code 0."""
        return self._read(self._embed_text(text_BT), cache, 0)

    def read_code(self, code_B: Tensor, index: int, cache: Cache) -> Tensor:
        """Put code `index` of the N into the cache; returns the hidden state [B, D] that predicts the next."""
        return self.read_codes(code_B[:, None], index, cache)

    def read_codes(self, codes_Bn: Tensor, start: int, cache: Cache) -> Tensor:
        """Put codes `start` .. `start + n - 1` of the N into the cache; returns the hidden state [B, D] that predicts
        code `start + n`.

        Each level's own ids, as `forward` takes them; they may cross from one level to the next. The text and the
        codes before `start` must be in the cache.
        """
        x_BnD = self._embed_codes(codes_Bn, start)
        return self._read(x_BnD, cache, self.layout.text_length + 1 + start)

    def read_window(self, codes_Bn: Tensor, start: int, cache: Cache) -> Tensor:
        """As `read_codes`; the hidden states [B, n, D] that predict the code after each."""
        return self.norm(self._through(self._embed_codes(codes_Bn, start), cache, self.layout.text_length + 1 + start))

    def _read(self, x_BSD: Tensor, cache: Cache, start: int) -> Tensor:
        return self.norm(self._through(x_BSD, cache, start)[:, -1])

    def _through(self, x_BSD: Tensor, cache: Cache, start: int) -> Tensor:
        """All blocks, of positions `start` ..: [B, S, D]."""
        x_BSD = working_precision(x_BSD)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BSD = block(x_BSD, self.tables, layer_cache, start)
        return x_BSD

    def _embed_text(self, text_BT: Tensor) -> Tensor:
        """Start + text, with each position's own pad in place of id 0: [B, T + 1, D]."""
        ids_BT = torch.where(text_BT == PAD_ID, self.tables.pad_ids, text_BT)
        start_B1 = ids_BT.new_full((len(ids_BT), 1), self.ids.start_id)
        embedded: Tensor = self.embedding(torch.cat([start_B1, ids_BT], dim=1))
        return embedded if self.text_position is None else embedded + self.text_position.weight

    def _embed_codes(self, codes_Bn: Tensor, start: int = 0) -> Tensor:
        """Codes `start` .. `start + n - 1` of the N: [B, n, D]."""
        end = start + codes_Bn.shape[1]
        embedded: Tensor = self.embedding(codes_Bn + self.tables.code_offsets[start:end])
        return embedded + self._code_positions(start, end) if len(self.rows) else embedded

    def _code_positions(self, start: int, end: int) -> Tensor:
        """Row + column embedding of codes start .. end - 1 of the N: [n, D]; adds up only the rows that it needs."""
        positions = []
        for (begin, size), level, row, column in zip(
            self._parts, self.layout.levels, self.rows, self.columns, strict=True
        ):
            low, high = max(start - begin, 0), min(end - begin, size)
            if low < high:
                first, last = low // level.width, -(-high // level.width)
                # Of a single code: the gradients of two views would share their memory, and be clipped twice.
                one = len(row) == len(column) == 1
                grid = row + column if one else (row[first:last, None] + column[None]).flatten(0, 1)
                positions.append(grid[low - first * level.width : high - first * level.width])
        return torch.cat(positions)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors (float32) and config.json."""
        save_model(self, self.exported_config(), directory)

    def exported_config(self) -> dict[str, object]:
        """Its config.json."""
        shape = self.shape.model_dump(include=set(_SHAPE_FIELDS))
        if self.order == "raster":  # its config.json is as it was before there were others
            del shape["order"]
        if self.shape.code_groups == 1:
            del shape["code_groups"]
        return {"model_type": MODEL_TYPE, "layout": self.layout.to_dict(), "shape": shape}

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Transformer:
        """In eval mode; in float32 unless `dtype` says otherwise.

        Raises:
            UserError: files are missing or do not fit together.
        """

        def build(config: dict[str, Any], where: str) -> Transformer:
            return cls(Layout.from_dict(config["layout"]), parse_config(TransformerShape, config["shape"], where))

        return load_model(directory, "transformer", ("layout", "shape"), build, dtype, device)


def working_precision(x: Tensor) -> Tensor:
    """Under autocast, the residual stream in its dtype: on CPUs float32 here would halve the training speed."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


_SHAPE_FIELDS = tuple(TransformerShape.model_fields)
