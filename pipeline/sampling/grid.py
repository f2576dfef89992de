"""Image grids with captions: what everybody looks at first.

grid([Group("Training captions", [Tile(image, "red heart"), ...])], columns=8).save("prompts.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

_PAPER, _CARD, _EDGE = "#f6f4ef", "#ffffff", "#e3dfd6"
_INK, _FAINT = "#2a2a2e", "#77746c"
_MARGIN, _GAP, _PADDING = 28, 14, 10
_TITLE_SIZE, _NOTE_SIZE, _CAPTION_SIZE = 22, 14, 14
_CAPTION_LINES = 3


@dataclass(frozen=True)
class Tile:
    """An image and the text under it."""

    image: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class Group:
    """Tiles under one heading; `note` is a fainter line below it."""

    title: str
    tiles: Sequence[Tile]
    note: str = ""


def grid(groups: Sequence[Group], columns: int = 8, side: int = 128, smooth: bool = False) -> Image.Image:
    """One sheet with all groups, RGB.

    Args:
        columns: images per row.
        side: width of an image on the sheet in pixels.
        smooth: enlarge with Lanczos; otherwise every source pixel stays a crisp square.
    """
    width = 2 * _MARGIN + columns * (side + 2 * _PADDING) + (columns - 1) * _GAP
    height = 2 * _MARGIN - _GAP + sum(_group_height(group, columns, side) for group in groups)
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _MARGIN
    for group in groups:
        _draw_group(sheet, group, top, columns, side, smooth)
        top += _group_height(group, columns, side)
    return sheet


def _group_height(group: Group, columns: int, side: int) -> int:
    rows = -(-len(group.tiles) // columns)
    return _heading_height(group) + rows * (_card_height(group, side) + _GAP)


def _card_height(group: Group, side: int) -> int:
    """Height in pixels of a group's cards: what its longest caption needs."""
    lines = max((len(_wrap(tile.caption, side)) for tile in group.tiles), default=0)
    return _image_height(group, side) + 2 * _PADDING + (lines * _line_height(_CAPTION_SIZE) + 6 if lines else 0)


def _image_height(group: Group, side: int) -> int:
    """Height in pixels of a group's highest image on the sheet."""
    return max((round(side * tile.image.height / tile.image.width) for tile in group.tiles), default=side)


def _heading_height(group: Group) -> int:
    title = _line_height(_TITLE_SIZE) + 4 if group.title else 0
    note = _line_height(_NOTE_SIZE) + 4 if group.note else 0
    return title + note + (8 if title or note else 0)


def _draw_group(sheet: Image.Image, group: Group, top: int, columns: int, side: int, smooth: bool) -> None:
    card_height = _card_height(group, side)
    draw = ImageDraw.Draw(sheet)
    if group.title:
        draw.text((_MARGIN, top), group.title, fill=_INK, font=_font(_TITLE_SIZE, group.title))
    if group.note:
        note_top = top + (_line_height(_TITLE_SIZE) + 4 if group.title else 0)
        draw.text((_MARGIN, note_top), group.note, fill=_FAINT, font=_font(_NOTE_SIZE, group.note))
    top += _heading_height(group)
    for index, tile in enumerate(group.tiles):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (side + 2 * _PADDING + _GAP)
        size = (side, card_height, _image_height(group, side))
        _draw_card(sheet, draw, tile, (left, top + row * (card_height + _GAP)), size, smooth)


def _draw_card(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    tile: Tile,
    corner: tuple[int, int],
    size: tuple[int, int, int],
    smooth: bool,
) -> None:
    """`size`: width of the image, height of the card, and of the group's highest image."""
    (left, top), (side, height, image_height) = corner, size
    box = (left, top, left + side + 2 * _PADDING - 1, top + height - 1)
    draw.rounded_rectangle(box, radius=9, fill=_CARD, outline=_EDGE)
    resample = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    image = tile.image.convert("RGB").resize((side, round(side * tile.image.height / tile.image.width)), resample)
    sheet.paste(image, (left + _PADDING, top + _PADDING))
    middle = left + _PADDING + side // 2
    for number, line in enumerate(_wrap(tile.caption, side)):
        line_top = top + _PADDING + image_height + 6 + number * _line_height(_CAPTION_SIZE)
        draw.text((middle, line_top), line, fill=_INK, font=_font(_CAPTION_SIZE, tile.caption), anchor="ma")


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own font draws a box for "ü"; matplotlib brings one that knows most alphabets.
    return _loaded(size, latin=text.isascii())


@lru_cache
def _loaded(size: int, latin: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if latin:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", round(size * 0.9))


def _line_height(size: int) -> int:
    return round(size * 1.3)


def _wrap(text: str, width: int) -> list[str]:
    """Break `text` greedily into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    font = _font(_CAPTION_SIZE, text)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > _CAPTION_LINES:
        lines = [*lines[: _CAPTION_LINES - 1], " ".join(lines[_CAPTION_LINES - 1 :])]
    return [_shorten(line, width, font) for line in lines]


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line.rstrip() + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
