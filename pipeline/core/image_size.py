"""The size of a model's images, as configs have it: one number for squares, [height, width] for others."""

from __future__ import annotations

from collections.abc import Sequence

ImageSize = int | tuple[int, int]  # pixels of each side, or height and width, which differ


PIXELS_AT_ONCE = 2**20  # where many images pass a network or a metric: 16 of 256 × 256


def images_at_once(height: int, width: int) -> int:
    """How many images of that size make `PIXELS_AT_ONCE`, at least one."""
    return max(PIXELS_AT_ONCE // (height * width), 1)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def image_size(size: int | Sequence[int]) -> ImageSize:
    """The one form that a size has: [64, 64] is 64."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def told(size: int | Sequence[int]) -> str:
    """For people: 64×64, or 32×64 with what comes first."""
    height, width = height_width(size)
    return f"{height}×{width}" + ("" if height == width else " (height × width)")
