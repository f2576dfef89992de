"""Which earlier positions each position sees.

Three patterns of Ramesh et al. 2021 (appendix B.1 and figure 11), beside the full one. Text is causal, and every code
sees all text; of several levels, it sees all coarser ones too. Within its own level, W codes wide, a code sees itself
and

    row           the W codes before it in raster order, as far as the one above it
    column        the codes above it in its column
    convolution   the causal half of a square of `kernel` x `kernel` codes around it, wrapping around at the sides

Layer i of L, counted from 1: convolution if i = L, column if (i - 2) mod 4 = 0, else row ("row, column, row, row").

S positions are read: start, T of text, and the N codes but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.layout import Layout

Pattern = Literal["full", "row", "column", "convolution"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query, key, as FlexAttention takes it


def pattern_of(layer: int, shape: TransformerShape) -> Pattern:
    """The pattern of 0-based `layer`."""
    if shape.attention == "full":
        return "full"
    if layer + 1 == shape.layers:
        return "convolution"
    return "column" if (layer + 1 - 2) % 4 == 0 else "row"


class PositionArrays(NamedTuple):
    """What the patterns need to know of each position; int64 [S] each."""

    level: Tensor  # -1: start and text
    level_width: Tensor  # codes per row; 1 for start and text


def position_arrays(layout: Layout, device: torch.device) -> PositionArrays:
    """Level and width of its level for each of the S positions."""
    levels, widths = [-1] * (layout.text_length + 1), [1] * (layout.text_length + 1)
    for number, level in enumerate(layout.levels):
        levels += [number] * level.positions
        widths += [level.width] * level.positions
    # The last code is predicted, never read.
    return PositionArrays(torch.tensor(levels[:-1], device=device), torch.tensor(widths[:-1], device=device))


def mask_mod(pattern: Pattern, layout: Layout, kernel: int, device: torch.device) -> MaskMod:
    """A function that tells whether query positions see key positions (integer tensors that broadcast): bool.

    Plain tensor operations, so that the same lines make a dense mask and FlexAttention's.
    """
    positions = position_arrays(layout, device)

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = query - key
        if pattern == "full":
            return back >= 0
        width = positions.level_width[query]
        if pattern == "row":
            near = back <= width
        elif pattern == "column":
            near = back % width == 0
        else:
            half = kernel // 2
            # back = rows * width + sideways, 0 <= rows <= half, |sideways| <= half
            near = (back <= half * width + half) & ((back + half) % width <= 2 * half)
        coarser = positions.level[key] != positions.level[query]
        return (back >= 0) & (near | coarser | (positions.level[query] < 0))

    return mask


def dense_mask(pattern: Pattern, layout: Layout, kernel: int, device: torch.device) -> Tensor:
    """The pattern as bool [S, S]: row sees column."""
    positions = torch.arange(layout.length, device=device)
    every = torch.zeros((), dtype=torch.int64, device=device)  # patterns are the same for each sample and head
    return mask_mod(pattern, layout, kernel, device)(every, every, positions[:, None], positions[None])
