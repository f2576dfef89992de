"""Which earlier positions each position sees.

Three patterns of Ramesh et al. 2021 (appendix B.1 and figure 11), beside the full one. Text is causal, and every code
sees all text; of several levels, it sees all coarser ones too. Within its own level, W codes wide, a code sees itself
and

    row           the W codes before it in raster order, as far as the one above it
    column        the codes above it in its column
    convolution   the causal half of a square of `kernel` x `kernel` codes around it, wrapping around at the sides

Layer i of L, counted from 1: convolution if i = L, column if (i - 2) mod 4 = 0, else row ("row, column, row, row").

S positions are read: start, T of text, and the N codes but the last.

Models of order scale have a pattern of their own, `levels`: a code's position, which asks for it, sees all text, the
coarser levels and its own whole level (Tian et al. 2024, section 3.1). S is T + 1 + N there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.layout import Layout

BLOCK = 128  # positions of a block of FlexAttention, both ways
_PAIRS_AT_A_TIME = 2**20  # that a dense mask compares: all of 16,512 positions would take 1.1 GB, several times
Pattern = Literal["full", "row", "column", "convolution", "levels"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query, key, as FlexAttention takes it


def pattern_of(layer: int, shape: TransformerShape) -> Pattern:
    """The pattern of 0-based `layer`."""
    if shape.order == "scale":
        return "levels"
    if shape.attention == "full":
        return "full"
    if layer + 1 == shape.layers:
        return "convolution"
    return "column" if (layer + 1 - 2) % 4 == 0 else "row"


def length_of(pattern: Pattern, layout: Layout) -> int:
    """The S positions of a whole sequence."""
    return layout.length + (1 if pattern == "levels" else 0)


class PositionArrays(NamedTuple):
    """What the patterns need to know of each position; int32 [T + 1 + N] each."""

    level: Tensor  # -1: start and text
    level_width: Tensor  # codes per row; 1 for start and text
    column: Tensor  # within the level; 0 for start and text


def position_arrays(layout: Layout, device: torch.device) -> PositionArrays:
    """Level, its width, and the column there, of start, text and all codes."""
    text = layout.text_length + 1
    levels, widths, columns = [-1] * text, [1] * text, [0] * text
    for number, level in enumerate(layout.levels):
        levels += [number] * level.positions
        widths += [level.width] * level.positions
        columns += list(range(level.width)) * level.height
    return PositionArrays(*torch.tensor([levels, widths, columns], dtype=torch.int32, device=device))


def mask_mod(pattern: Pattern, layout: Layout, kernel: int, device: torch.device) -> MaskMod:
    """A function that tells whether query positions see key positions (integer tensors that broadcast): bool.

    Plain tensor operations, so that the same lines make a dense mask and FlexAttention's.
    """
    positions = position_arrays(layout, device)

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = query - key
        if pattern == "full":
            return back >= 0
        coarser = positions.level[key] != positions.level[query]
        if pattern == "levels":
            return (back >= 0) | (~coarser & (positions.level[query] >= 0))
        width = positions.level_width[query]
        if pattern == "row":
            near = back <= width
        elif pattern == "column":
            near = positions.column[query] == positions.column[key]
        else:
            half = kernel // 2
            # back = rows * width + sideways, 0 <= rows <= half, |sideways| <= half
            near = (back <= half * width + half) & ((back + half) % width <= 2 * half)
        return (back >= 0) & (near | coarser | (positions.level[query] < 0))

    return mask


def dense_mask(pattern: Pattern, layout: Layout, kernel: int, device: torch.device) -> Tensor:
    """The pattern as bool [S, S]: row sees column."""
    length = length_of(pattern, layout)
    rows = max(_PAIRS_AT_A_TIME // length, 1)
    return torch.cat(list(_masks_of_rows(mask_mod(pattern, layout, kernel, device), length, rows, device)))


def column_major(layout: Layout, device: torch.device) -> Tensor:
    """The S positions with each level's codes column by column: int64 [S].

    In this order what a column layer sees lies side by side, and FlexAttention can leave out the blocks between.
    """
    first = layout.text_length + 1
    order = [torch.arange(first)]
    for level, start in zip(layout.levels, layout.level_starts, strict=True):
        codes = torch.arange(level.positions).view(level.height, level.width)
        order.append(first + start + codes.T.flatten())
    return torch.cat(order)[:-1].to(device)  # the last code, which is never read, is the last of the last column too


def reordered(mask: MaskMod, order: Tensor) -> MaskMod:
    """`mask` for queries and keys that are given in `order`."""
    return lambda batch, head, query, key: mask(batch, head, order[query], order[key])


def seen_in_blocks(mask: MaskMod, length: int, device: torch.device) -> Tensor:
    """How many pairs of positions `mask` allows in each block of BLOCK x BLOCK: int64 [blocks, blocks]."""
    counts = []
    for seen in _masks_of_rows(mask, length, BLOCK, device):
        padded = F.pad(seen, (0, -length % BLOCK))
        counts.append(padded.view(len(seen), -1, BLOCK).sum(dim=(0, 2)))
    return torch.stack(counts)


def _masks_of_rows(mask: MaskMod, length: int, rows: int, device: torch.device) -> Iterator[Tensor]:
    """`mask` of all `length` positions, bool [rows, length] at a time."""
    positions = torch.arange(length, dtype=torch.int32, device=device)
    every = torch.zeros((), dtype=torch.int32, device=device)  # patterns are the same for each sample and head
    for queries in positions.split(rows):
        yield mask(every, every, queries[:, None], positions[None])
