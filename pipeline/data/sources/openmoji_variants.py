"""More captioned images made of OpenMoji's: in other colors, without color, two together.

What differs is what the caption says, so a model can learn which words mean which part of an image, and be asked
for what it never saw: of every thing only some of the colors are drawn. Which ones is a function of its code points.
Things are food, plants, animals and vehicles.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.core.seeds import hash64

# OpenMoji's palette, light to dark; a shade becomes the shade at its place in the other color.
PALETTE = {
    "red": ("#EA5A47", "#D22F27", "#781E32"),
    "orange": ("#F4AA41", "#E27022", "#E27022"),
    "yellow": ("#FCEA2B", "#F1B31C", "#F1B31C"),
    "green": ("#B1CC33", "#5C9E31", "#186648"),
    "blue": ("#92D3F5", "#61B2E4", "#1E50A0"),
    "purple": ("#B399C8", "#8967AA", "#8967AA"),
    "pink": ("#FFA7C0", "#E67A94", "#E67A94"),
    "brown": ("#A57939", "#6A462F", "#6A462F"),
    "grey": ("#D0CFCE", "#9B9B9A", "#3F3F3F"),
}
_COLOR_WORDS = (*PALETTE, "black", "white")
_COLOR_OF = {
    shade: (color, place) for color, shades in PALETTE.items() for place, shade in reversed([*enumerate(shades)])
}
_SHADE = re.compile(r"#[0-9a-fA-F]{6}\b")
_LEAST_SHARE = 0.08  # of the image's area in one color, below which it has none that a caption could name

# Code points of food, plants, animals and vehicles: things that can stand beside each other.
_THINGS = (
    (0x1F32D, 0x1F37F),
    (0x1F400, 0x1F43F),
    (0x1F680, 0x1F6A4),
    (0x1F6F0, 0x1F6FC),
    (0x1F950, 0x1F96F),
    (0x1F980, 0x1F9AE),
    (0x1FAB0, 0x1FABF),
    (0x1FAD0, 0x1FADF),
)


class Variant(NamedTuple):
    """An image to make of others: `kind` color (of `stems[0]`, to `color`), grayscale or pair."""

    key: str
    caption: str
    kind: str
    stems: tuple[str, ...]
    color: str = ""


def is_thing(stem: str) -> bool:
    """Whether the emoji of this file stem is one food, plant, animal or vehicle."""
    return "-" not in stem and any(first <= int(stem, 16) <= last for first, last in _THINGS)


def without_color(name: str) -> str:
    """A name without the color that it begins with: "red apple" is an apple."""
    first, _, rest = name.partition(" ")
    return rest if rest and first in _COLOR_WORDS else name


def colored(named: Sequence[tuple[str, str]], number: int) -> Iterator[Variant]:
    """`number` colors of each thing, as far as no emoji has that caption already."""
    names = {name for _, name in named}
    for stem, name in _things(named):
        for color in sorted(PALETTE, key=lambda color: hash64("color", stem, color))[:number]:
            caption = f"{color} {without_color(name)}"
            if caption not in names:
                yield Variant(f"{stem}-{color}", caption, "color", (stem,), color)


def grayscale(named: Sequence[tuple[str, str]], share: float) -> Iterator[Variant]:
    """This share of all things without color."""
    for stem, name in _things(named):
        if hash64("grayscale", stem) < share * 2**64:
            yield Variant(f"{stem}-grayscale", f"grayscale {without_color(name)}", "grayscale", (stem,))


def paired(named: Sequence[tuple[str, str]], number: int) -> Iterator[Variant]:
    """`number` different pairs of things, the first above the second at its right."""
    things = _things(named)
    seen: set[tuple[int, int]] = set()
    for turn in range(number * 4):
        first, second = (hash64("pair", turn, side) % len(things) for side in (0, 1)) if things else (0, 0)
        if len(seen) == number or len(things) < 2:
            return
        if first != second and (first, second) not in seen:
            seen.add((first, second))
            (a, name), (b, other) = things[first], things[second]
            yield Variant(f"{a}+{b}", f"{name} and {other}", "pair", (a, b))


def _things(named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(stem, name) for stem, name in named if is_thing(stem)]


def group_of(variant: Variant) -> str:
    """What decides the split: the emoji that validation takes first, so training never shows one of validation's."""
    return min(variant.stems, key=lambda stem: hash64("split", stem))


def svg_of(variant: Variant, sources: Sequence[str]) -> str | None:
    """The SVG of a variant of these SVGs, or None if the emoji has no color to replace."""
    if variant.kind == "pair":
        return _together(*sources)
    if variant.kind == "grayscale":
        return without_colors(sources[0])
    return recolored(sources[0], variant.color)


def recolored(svg: str, color: str) -> str | None:
    """`svg` with its largest color, by area, replaced by `color`; None if none is large."""
    own = _largest_color(svg)
    if own is None:
        return None
    shades = {shade: PALETTE[color][place] for shade, (name, place) in _COLOR_OF.items() if name == own}
    return _SHADE.sub(lambda match: shades.get(match[0].upper(), match[0]), svg)


def without_colors(svg: str) -> str | None:
    """`svg` in shades of grey, or None if its largest color is one already."""
    if _largest_color(svg) in (None, "grey"):
        return None
    return _SHADE.sub(lambda match: _grey(match[0]), svg)


def _grey(shade: str) -> str:
    red, green, blue = (int(shade[at : at + 2], 16) for at in (1, 3, 5))
    luma = round(0.299 * red + 0.587 * green + 0.114 * blue)  # ITU-R BT.601
    return "#" + f"{luma:02X}" * 3


def _together(first: str, second: str) -> str:
    placed = (
        svg.replace("<svg ", f'<svg x="{x}" y="{y}" width="44" height="44" ', 1)
        for svg, x, y in ((first, -2, -2), (second, 30, 30))
    )
    return f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{"".join(placed)}</svg>'


def render(svg: str, size: int) -> bytes:
    """A PNG of `size` x `size` pixels on white."""
    import resvg_py

    # resvg antialiases exactly by coverage: rendering larger and shrinking looks the same and costs more.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return bytes(png)


def is_flag(stem: str) -> bool:
    """Whether the emoji of this file stem is a flag."""
    first = int(stem.split("-")[0], 16)
    return 0x1F1E6 <= first <= 0x1F1FF or first == 0x1F3F4


def _largest_color(svg: str) -> str | None:
    pixels = np.asarray(Image.open(io.BytesIO(render(svg, 48)), formats=("PNG",)).convert("RGB"), np.int16).reshape(
        -1, 3
    )
    area = dict.fromkeys(PALETTE, 0)
    for shade, (color, _) in _COLOR_OF.items():
        there = np.array([int(shade[at : at + 2], 16) for at in (1, 3, 5)])
        area[color] += int((np.abs(pixels - there).max(1) < 4).sum())
    color = max(area, key=area.__getitem__)
    return color if area[color] >= _LEAST_SHARE * len(pixels) else None
