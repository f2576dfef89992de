"""Large images in tiles: what convolutions make of a whole image, from windows of it that take less memory.

A position's output depends on no input further away than the layers' kernels reach. So a tile's window has a margin of
that many positions on each side (less at the image's own edge, where the layers pad as ever), of which nothing is
kept: the tiles meet without a seam, and the whole is what one pass gives, but for the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor


def reach(of_resolutions: Sequence[int], of_stem: int = 0) -> int:
    """Positions of the coarsest resolution that an output sees on each side of its own.

    Args:
        of_resolutions: what the blocks of each see, in positions of theirs, coarse to fine; each next one doubles.
        of_stem: what a first layer sees, in positions of the finest.
    """
    finest = 2 ** (len(of_resolutions) - 1)
    return math.ceil(sum(r / 2**i for i, r in enumerate(of_resolutions)) + of_stem / finest)


def by_tiles(run: Callable[[Tensor], list[Tensor]], x_BCHW: Tensor, unit: int, tile: int, margin: int) -> list[Tensor]:
    """`run(x)` of x, put together from windows of `tile` + 2 · `margin` positions on each side, or less.

    Args:
        run: a window [B,C,h·unit,w·unit] to outputs [B,C',h·u,w·u], each with a u of its own.
        unit: of x's pixels on a side, one position.
    """
    height, width = (side // unit for side in x_BCHW.shape[-2:])
    whole = list[Tensor]()
    for top in range(0, height, tile):
        rows = range(max(0, top - margin), min(height, top + tile + margin))
        for left in range(0, width, tile):
            columns = range(max(0, left - margin), min(width, left + tile + margin))
            window = x_BCHW[..., rows[0] * unit : rows.stop * unit, columns[0] * unit : columns.stop * unit]
            parts = run(window)
            units = [part.shape[-1] // len(columns) for part in parts]
            if not whole:
                whole = [p.new_empty(*p.shape[:2], height * u, width * u) for p, u in zip(parts, units, strict=True)]
            for part, u, out in zip(parts, units, whole, strict=True):
                _place(
                    out,
                    part,
                    range(top * u, min(top + tile, height) * u),
                    range(left * u, min(left + tile, width) * u),
                    rows[0] * u,
                    columns[0] * u,
                )
    return whole


def _place(out: Tensor, part: Tensor, rows: range, columns: range, top: int, left: int) -> None:
    """Copy these rows and columns of `out` from a window of it that begins at (top, left)."""
    inner = part[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    out[..., rows.start : rows.stop, columns.start : columns.stop] = inner
