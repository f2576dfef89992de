"""Constants that follow from a model's layout and shape, made at first use on its device."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.config.transformer import TransformerShape
from pipeline.core.compiler import missing_compiler
from pipeline.core.resize import resize_matrix
from pipeline.transformer.attention_patterns import (
    BLOCK,
    Pattern,
    column_major,
    dense_mask,
    length_of,
    mask_mod,
    reordered,
    seen_in_blocks,
)
from pipeline.transformer.layout import Layout
from pipeline.transformer.rotary import angles_of_all, cosine_sine

log = logging.getLogger(__name__)


class Tables:
    """Offsets, rotary angles and masks of one model on one device.

    No buffers: never saved, never cast, the same however the weights came. S positions, T of text, N codes, K head
    width.
    """

    @torch.inference_mode(False)  # training could not use tensors that inference mode made
    def __init__(self, layout: Layout, shape: TransformerShape, device: torch.device) -> None:
        self.layout, self.shape, self.device = layout, shape, device
        sizes = [level.positions for level in layout.levels]
        offsets = [torch.full((n,), o) for n, o in zip(sizes, layout.level_offsets, strict=True)]
        self.code_offsets = torch.cat(offsets).to(device)  # [N]
        self.pad_ids = layout.pad_offset + torch.arange(layout.text_length, device=device)  # [T]
        self._cosine_sine: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._allowed: dict[Pattern, Tensor] = {}
        self._bias: dict[tuple[Pattern, torch.dtype], Tensor] = {}
        self._block_masks: dict[Pattern, BlockMask] = {}
        self._compiles_flex: bool | None = None
        self._column_major: tuple[Tensor, Tensor] | None = None
        self._resizing: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode(False)
    def rotary(self, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions start .. end - 1 for `rotate`: [S, K] each."""
        cosine, sine = self._all_rotary(dtype)
        return cosine[start:end], sine[start:end]

    def rotary_at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same of any positions, the last code's included: [..., K] each."""
        cosine, sine = self._all_rotary(dtype)
        return cosine[positions], sine[positions]

    @torch.inference_mode(False)
    def _all_rotary(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self._cosine_sine:
            angles = angles_of_all(self.layout, self.shape.head_width, self.device)
            self._cosine_sine[dtype] = cosine_sine(angles, dtype)
        return self._cosine_sine[dtype]

    @torch.inference_mode(False)
    def allowed(self, pattern: Pattern) -> Tensor:
        """The dense mask, bool [S, S]: row sees column."""
        if pattern not in self._allowed:
            self._allowed[pattern] = dense_mask(pattern, self.layout, self.shape.conv_kernel, self.device)
        return self._allowed[pattern]

    @torch.inference_mode(False)
    def bias(self, pattern: Pattern, dtype: torch.dtype) -> Tensor:
        """The mask to add to scores, [S, S]: 0 where row sees column, else minus infinity."""
        if (pattern, dtype) not in self._bias:
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._bias[pattern, dtype] = torch.where(self.allowed(pattern), zero, float("-inf"))
        return self._bias[pattern, dtype]

    @torch.inference_mode(False)
    def column_major(self) -> tuple[Tensor, Tensor]:
        """The order of positions in which FlexAttention gets column layers, and the order that undoes it: [S] each."""
        if self._column_major is None:
            order = column_major(self.layout, self.device)
            self._column_major = order, order.argsort()
        return self._column_major

    @torch.inference_mode(False)
    def to_finest(self, level: int) -> tuple[Tensor, Tensor]:
        """What rows and columns of a level's grid are multiplied by to make a grid of the finest level, bicubic: [H, h]
        and [W, w]."""
        grid, finest = self.layout.levels[level], self.layout.levels[-1]
        return self._resize(level, "bicubic", (grid.height, finest.height), (grid.width, finest.width))

    @torch.inference_mode(False)
    def from_finest(self, level: int) -> tuple[Tensor, Tensor]:
        """The way back, the mean over the area: [h, H] and [w, W]."""
        grid, finest = self.layout.levels[level], self.layout.levels[-1]
        return self._resize(level, "area", (finest.height, grid.height), (finest.width, grid.width))

    def _resize(self, level: int, mode: str, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if (level, mode) not in self._resizing:
            matrices = resize_matrix(*rows, mode), resize_matrix(*columns, mode)
            self._resizing[level, mode] = matrices[0].to(self.device), matrices[1].to(self.device)
        return self._resizing[level, mode]

    @property
    def compiles_flex(self) -> bool:
        """Whether FlexAttention can be compiled here; where it cannot, the log says what is missing, once."""
        if self._compiles_flex is None:
            on_gpu = self.device.type == "cuda" and torch.cuda.is_available()  # elsewhere fake tensors play a GPU
            missing = missing_compiler(self.device) if on_gpu else None
            self._compiles_flex = missing is None
            if missing:
                log.warning(
                    "attention: expected %s, found none: attention that is sparse or of order scale takes dense masks,"
                    " and is slower than FlexAttention; install it",
                    missing,
                )
        return self._compiles_flex

    @torch.inference_mode(False)
    def block_mask(self, pattern: Pattern) -> BlockMask:
        """FlexAttention's form of the mask: which blocks of 128 x 128 positions hold anything at all.

        Of column layers for positions in the order of `column_major`. Built block row by block row: torch's
        `create_block_mask` holds all pairs of positions, several times and some in int64, if it is not compiled.
        """
        if pattern not in self._block_masks:
            length = length_of(pattern, self.layout)
            mask = mask_mod(pattern, self.layout, self.shape.conv_kernel, self.device)
            if pattern == "column":
                mask = reordered(mask, self.column_major()[0])
            seen = seen_in_blocks(mask, length, self.device)
            whole = seen == BLOCK**2
            self._block_masks[pattern] = BlockMask.from_kv_blocks(
                *_chosen_blocks((seen > 0) & ~whole),
                *_chosen_blocks(whole),
                BLOCK_SIZE=BLOCK,
                mask_mod=mask,
                seq_lengths=(length, length),
            )
        return self._block_masks[pattern]


def _chosen_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks, how many are chosen and which, these first: int32 [1, 1, n] and [1, 1, n, n]."""
    numbers = chosen.sum(dim=-1, dtype=torch.int32)
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return numbers[None, None], indices[None, None]
