"""Image prompts: which codes of a given image stay, and which are generated anew.

    ImagePrompt(image, keep_rows=8)        complete: the first 8 rows of codes stay
    ImagePrompt(image, keep_levels=1)      vary: the coarse level stays, the finer ones are generated
    ImagePrompt(image, mask=mask)          fill: white pixels of the mask are generated
    extended(image, {"left": 8})           go on beyond an edge: the image moves, and what it leaves is generated

A raster model generates codes in order, level by level, and sees only what comes before. So a filled region knows
what is above it and left of it, and of finer levels also the coarse codes of everything; it does not know what stays
below it and right of it within its level. `docs/sampling.md` says what helps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.image_io import to_tensor
from pipeline.core.level import Level
from pipeline.data.images import to_rgb
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.image_tokenizer.evaluation import precision_of_codes
from pipeline.sampling.draw_next import UNKNOWN

_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@dataclass(frozen=True)
class ImagePrompt:
    """An image and one rule that tells what stays of it.

    Args:
        image: of the image tokenizer's size, in any mode; white shows through where it is transparent.
        keep_rows: rows of codes of the finest level that stay, from the top.
        keep_levels: coarse levels that stay whole.
        mask: of the image's size, in any mode; a code of the finest level is generated where its square holds a pixel
            of 128 or more, which a transparent one is not.

    With rows and masks, a code of a coarser level is generated where no code of the finest level stays in its square: a
    new one would change what stays.
    """

    image: Image.Image
    keep_rows: int | None = None
    keep_levels: int | None = None
    mask: Image.Image | None = None

    @cached_property
    def sha256(self) -> str:
        """Of the pixels of image and mask: file names say nothing of what is in them."""
        pixels = (part.mode.encode() + part.tobytes() for part in (self.image, self.mask) if part)
        return hashlib.sha256(b"".join(pixels)).hexdigest()

    def __post_init__(self) -> None:
        rules = [name for name in ("keep_rows", "keep_levels", "mask") if getattr(self, name) is not None]
        if len(rules) != 1:
            raise UserError(
                f"an image prompt needs one of keep_rows, keep_levels and mask, found {' and '.join(rules) or 'none'}"
            )


def extended(image: Image.Image, sides: Mapping[str, int]) -> ImagePrompt:
    """`image` moved away from `sides` by so many pixels each; the strips that it leaves are generated.

    The size stays the model's: what is moved beyond the other edge is gone. Until it is generated, a strip shows the
    image's edge: the image tokenizer's codes beside it would otherwise show one to a strip of some color.

    Raises:
        UserError: a side that there is not, two opposite ones, or no less pixels than the image has.
    """
    for side, pixels in sides.items():
        if side not in _OPPOSITE:
            raise UserError(f"extend: expected left, right, top or bottom, found {side!r}")
        if _OPPOSITE[side] in sides:
            raise UserError(f"extend: expected {side} or {_OPPOSITE[side]}, found both: the image moves one way")
        room = image.width if side in ("left", "right") else image.height
        if not 1 <= pixels < room:
            raise UserError(f"extend: expected {side} of 1 to {room - 1} pixels, found {pixels}")
    across = sides.get("left", 0) - sides.get("right", 0)
    down = sides.get("top", 0) - sides.get("bottom", 0)
    pixels_HWC = np.asarray(_opaque(image, "white").convert("RGB"))
    rows = np.clip(np.arange(image.height) - down, 0, image.height - 1)
    columns = np.clip(np.arange(image.width) - across, 0, image.width - 1)
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (across, down, across + image.width, down + image.height))
    return ImagePrompt(Image.fromarray(pixels_HWC[rows][:, columns]), mask=mask)


@torch.inference_mode()
def known_codes(tokenizer: ImageTokenizer, prompt: ImagePrompt, device: torch.device) -> Tensor:
    """The codes of `prompt` for all levels, int64 [N], coarse to fine; UNKNOWN (-1) where one is to be generated.

    Raises:
        UserError: image or mask of another size, or more rows or levels than there are.
    """
    height, width = tokenizer.height, tokenizer.width
    for name, image in (("an image", prompt.image), ("a mask", prompt.mask)):
        if image is not None and image.size != (width, height):
            found = f"{image.width}×{image.height}"
            raise UserError(f"image prompt: expected {name} of {width}×{height} pixels, found {found}: resize it")
    with precision_of_codes(device):
        codes = tokenizer.encode(to_tensor([_opaque(prompt.image, "white")]).to(device))
    stays = _stays(prompt, tokenizer.levels)
    parts = [c[0].masked_fill(~s.to(device), UNKNOWN) for c, s in zip(codes, stays, strict=True)]
    return torch.cat(parts)


def _opaque(image: Image.Image, background: str) -> Image.Image:
    return to_rgb(image, background)[0] if image.has_transparency_data else image


def _stays(prompt: ImagePrompt, levels: Sequence[Level]) -> list[Tensor]:
    """Which codes stay: bool [h*w] for each level, of which the last is the finest."""
    if prompt.keep_levels is not None:
        if len(levels) == 1:
            raise UserError("keep_levels needs an image tokenizer of several levels, found one: use keep_rows")
        if not 1 <= prompt.keep_levels < len(levels):
            raise UserError(f"keep_levels: expected 1 to {len(levels) - 1} levels, found {prompt.keep_levels}")
        return [torch.full((v.height * v.width,), i < prompt.keep_levels) for i, v in enumerate(levels)]
    finest = levels[-1]
    if prompt.keep_rows is not None:
        if not 1 <= prompt.keep_rows < finest.height:
            raise UserError(f"keep_rows: expected 1 to {finest.height - 1} rows of codes, found {prompt.keep_rows}")
        stays = np.repeat(np.arange(finest.height)[:, None] < prompt.keep_rows, finest.width, axis=1)
    else:
        assert prompt.mask is not None
        generated = np.asarray(_opaque(prompt.mask, "black").convert("L")) >= 128
        if not generated.any():
            raise UserError("mask: expected white pixels where the image is to be generated, found none")
        stays = ~_any_within(generated, finest)
    return [torch.from_numpy(_any_within(stays, level)).flatten() for level in levels]


def _any_within(fine: NDArray[np.bool_], level: Level) -> NDArray[np.bool_]:
    """Is any of `fine` [H, W], pixels or codes of the finest level, true in a code's square? bool [h, w]."""
    height, width = fine.shape
    rows = [
        fine[_first(i, height, level.height) : _end(i, height, level.height)].any(axis=0) for i in range(level.height)
    ]
    by_row = np.stack(rows)
    columns = [
        by_row[:, _first(j, width, level.width) : _end(j, width, level.width)].any(axis=1) for j in range(level.width)
    ]
    return np.stack(columns, axis=1)


def _first(code: int, fine: int, codes: int) -> int:
    """The first of `fine`, in a row or column, that this one of its codes covers; codes may share one."""
    return code * fine // codes


def _end(code: int, fine: int, codes: int) -> int:
    return -(-(code + 1) * fine // codes)
