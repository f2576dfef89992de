"""Where each position lies, and which earlier ones it sees.

Three patterns of Ramesh et al. 2021 (appendix B.1 and figure 11), beside the full one. Text is causal, and every code
sees all text; of several levels, it sees all coarser ones too. Within its own level, W codes wide, a code sees itself
and

    row           the W codes before it in raster order, as far as the one above it
    column        the codes above it in its column
    convolution   the causal half of a square of `kernel` x `kernel` codes around it, wrapping around at the sides

Layer i of L, counted from 1: convolution if i = L, column if (i - 2) mod 4 = 0, else row ("row, column, row, row").

Rotary positions (Su et al. 2021) in two dimensions (Heo et al. 2024): half of a head's pairs turn by the row, half by
the column. The start token is at 0 and text i at i + 1, in both. A level's codes follow the text; all levels cover the
same square, so a coarse code lies amid the fine ones that it describes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.layout import Layout

Pattern = Literal["full", "row", "column", "convolution"]
_ROTARY_BASE = 10_000.0


def pattern_of(layer: int, shape: TransformerShape) -> Pattern:
    """Of 0-based `layer`."""
    if shape.attention == "full":
        return "full"
    if layer + 1 == shape.layers:
        return "convolution"
    return "column" if (layer + 1 - 2) % 4 == 0 else "row"


class Places(NamedTuple):
    """Of the S = T + N positions that are read; int64 [S] each."""

    level: Tensor  # -1: start and text
    level_width: Tensor  # 1 for text


def places_of(layout: Layout, device: torch.device) -> Places:
    levels, widths = [-1] * (layout.text_length + 1), [1] * (layout.text_length + 1)
    for number, level in enumerate(layout.levels):
        levels += [number] * level.positions
        widths += [level.width] * level.positions
    # The last code is predicted, never read.
    return Places(torch.tensor(levels[:-1], device=device), torch.tensor(widths[:-1], device=device))


def sees(pattern: Pattern, places: Places, kernel: int, query: Tensor, key: Tensor) -> Tensor:
    """Whether positions `query` see positions `key` (integer tensors that broadcast): bool.

    Plain tensor operations, so that the same lines make a dense mask and FlexAttention's.
    """
    back = query - key
    if pattern == "full":
        return back >= 0
    width = places.level_width[query]
    if pattern == "row":
        near = back <= width
    elif pattern == "column":
        near = back % width == 0
    else:
        half = kernel // 2
        # back = rows * width + sideways, 0 <= rows <= half, |sideways| <= half
        near = (back <= half * width + half) & ((back + half) % width <= 2 * half)
    coarser = places.level[key] != places.level[query]
    return (back >= 0) & (near | coarser | (places.level[query] < 0))


def dense_mask(pattern: Pattern, layout: Layout, kernel: int, device: torch.device) -> Tensor:
    """bool [S, S]: row sees column."""
    positions = torch.arange(layout.length, device=device)
    return sees(pattern, places_of(layout, device), kernel, positions[:, None], positions[None])


def rotary_angles(layout: Layout, head_width: int, device: torch.device) -> Tensor:
    """Angle of each pair at each position, float32 [S, K / 2]: half of the pairs by row, the rest by column."""
    text = torch.arange(layout.text_length + 1, dtype=torch.float64)
    rows, columns = [text], [text]
    finest_height = max(level.height for level in layout.levels)
    finest_width = max(level.width for level in layout.levels)
    for level in layout.levels:
        row = (torch.arange(level.height, dtype=torch.float64) + 0.5) * (finest_height / level.height) - 0.5
        column = (torch.arange(level.width, dtype=torch.float64) + 0.5) * (finest_width / level.width) - 0.5
        rows.append(layout.text_length + 1 + row.repeat_interleave(level.width))
        columns.append(layout.text_length + 1 + column.repeat(level.height))
    pairs = head_width // 4  # of each direction
    frequency = _ROTARY_BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = [torch.cat(places)[:-1, None] * frequency for places in (rows, columns)]
    return torch.cat(angles, dim=1).float().to(device)


class Tables:
    """Constants of one model on one device. No buffers: never saved, never cast, the same however the weights came."""

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
        self._block_masks: dict[Pattern, object] = {}

    @torch.inference_mode(False)
    def rotary(self, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles of positions start .. end - 1: [S, K / 2] each."""
        if dtype not in self._cosine_sine:
            angles = rotary_angles(self.layout, self.shape.width // self.shape.heads, self.device)
            self._cosine_sine[dtype] = (angles.cos().to(dtype), angles.sin().to(dtype))
        cosine, sine = self._cosine_sine[dtype]
        return cosine[start:end], sine[start:end]

    @torch.inference_mode(False)
    def allowed(self, pattern: Pattern) -> Tensor:
        """bool [S, S]."""
        if pattern not in self._allowed:
            self._allowed[pattern] = dense_mask(pattern, self.layout, self.shape.conv_kernel, self.device)
        return self._allowed[pattern]

    @torch.inference_mode(False)
    def bias(self, pattern: Pattern, dtype: torch.dtype) -> Tensor:
        """0 where allowed, else minus infinity: [S, S]."""
        if (pattern, dtype) not in self._bias:
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._bias[pattern, dtype] = torch.where(self.allowed(pattern), zero, float("-inf"))
        return self._bias[pattern, dtype]

    @torch.inference_mode(False)
    def block_mask(self, pattern: Pattern) -> object:
        """FlexAttention's form of the mask: which blocks of 128 x 128 hold anything at all."""
        if pattern not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            places, kernel = places_of(self.layout, self.device), self.shape.conv_kernel

            def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return sees(pattern, places, kernel, query, key)

            length = self.layout.length
            made = create_block_mask(mask, None, None, length, length, device=self.device)
            self._block_masks[pattern] = made
        return self._block_masks[pattern]
