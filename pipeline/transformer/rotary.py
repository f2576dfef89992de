"""Rotary positions (Su et al. 2021) in two dimensions (Heo et al. 2024).

Half of a head's pairs turn by the row, half by the column. The start token is at 0 and text i at i + 1, in both. A
level's codes follow the text; all levels cover the same square, so a coarse code lies amid the fine ones that it
describes.

Shapes: S positions, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.transformer.layout import Layout

_BASE = 10_000.0


def rotary_angles(layout: Layout, head_width: int, device: torch.device) -> Tensor:
    """Angle of each pair at each position that is read, float32 [S, K / 2]; see `angles_of_all`."""
    return angles_of_all(layout, head_width, device)[:-1]


def angles_of_all(layout: Layout, head_width: int, device: torch.device) -> Tensor:
    """The same with that of the last code, float32 [S + 1, K / 2]: half of the pairs by row, the rest by column."""
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
    frequency = _BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = [torch.cat(positions)[:, None] * frequency for positions in (rows, columns)]
    return torch.cat(angles, dim=1).float().to(device)


def cosine_sine(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` takes of `rotary_angles` [S, K / 2]: [S, K] each, the sine of a pair's first half negative."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], 1).to(dtype), torch.cat([-sine, sine], 1).to(dtype)


def rotate(x_BSHK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs (i, i + K / 2) by the angles of their positions: x * cosine + swapped(x) * sine.

    With the halves of a head swapped: four operations over whole heads, forward and backward, where the pairs' own
    products and sums are seven. Cosine and sine are rows of `cosine_sine`: [S, K], or each sample's own, [B, S, K].
    """
    first, second = x_BSHK.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1).mul_(sine.unsqueeze(-2))
    return (x_BSHK * cosine.unsqueeze(-2)).add_(swapped)


@dataclass
class RotaryTable:
    """`rotate` at one position, in place. Cosine and sine are [S, K] each."""

    cosine: Tensor
    sine: Tensor

    @classmethod
    def from_angles(cls, angles: Tensor, dtype: torch.dtype) -> RotaryTable:
        """The table of all positions from their `rotary_angles`, in `dtype`."""
        return cls(*cosine_sine(angles, dtype))

    def apply_(self, x_BHK: Tensor, position: int) -> None:
        swapped = x_BHK.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        x_BHK.mul_(self.cosine[position]).addcmul_(swapped, self.sine[position])
