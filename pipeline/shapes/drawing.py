"""Scenes as images: antialiased by exact coverage, the same bytes everywhere."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.shapes.scene import COLORS, SIZES, Scene

_OVERSAMPLED = 8
_INNER = 0.45  # radius of a star's inner corners over that of its outer ones
_ARM = 1 / 3  # width of a cross's arms over its side
Point = tuple[float, float]


def draw(scene: Scene, side: int) -> Image.Image:
    """The scene on white, RGB, `side` pixels square."""
    large = Image.new("RGB", (side * _OVERSAMPLED,) * 2, "white")
    pen = ImageDraw.Draw(large)
    for thing in scene.things:
        half = SIZES[thing.size] / 2
        _draw(pen, thing.shape, (thing.x - half, thing.y - half), 2 * half, large.width, COLORS[thing.color])
    return large.reduce(_OVERSAMPLED)


@lru_cache
def template(shape: str, side: int) -> npt.NDArray[np.float32]:
    """How much of each pixel a shape covers that fills the square: [side, side] in 0…1."""
    large = Image.new("L", (side * _OVERSAMPLED,) * 2, 0)
    _draw(ImageDraw.Draw(large), shape, (0.0, 0.0), 1.0, large.width, 255)
    return np.asarray(large.reduce(_OVERSAMPLED), dtype=np.float32) / np.float32(255)


def _draw(
    pen: ImageDraw.ImageDraw, shape: str, corner: Point, width: float, side: int, fill: tuple[int, int, int] | int
) -> None:
    """`corner` and `width` of the square around it, as shares of `side` pixels."""
    left, top, extent = corner[0] * side, corner[1] * side, width * side
    if shape == "circle":
        pen.ellipse((left, top, left + extent, top + extent), fill)
    else:
        pen.polygon([(left + x * extent, top + y * extent) for x, y in _OUTLINES[shape]], fill)


def _star() -> list[Point]:
    """Five points, stretched to fill the square."""
    corners = []
    for index in range(10):
        radius, angle = (1.0 if index % 2 == 0 else _INNER), math.pi * index / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return _filling(corners)


def _cross() -> list[Point]:
    near, far = (1 - _ARM) / 2, (1 + _ARM) / 2
    return [
        (near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far),
        (far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near),
    ]  # fmt: skip


def _filling(corners: list[Point]) -> list[Point]:
    lows = [min(corner[axis] for corner in corners) for axis in (0, 1)]
    spans = [max(corner[axis] for corner in corners) - lows[axis] for axis in (0, 1)]
    return [((x - lows[0]) / spans[0], (y - lows[1]) / spans[1]) for x, y in corners]


_OUTLINES: dict[str, list[Point]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": _star(),
    "cross": _cross(),
}
