"""A picture as part of the prompt: what of it stays, and what is painted anew.

    ImagePrompt(picture, keep_rows=8)        complete: the first 8 rows of codes stay
    ImagePrompt(picture, keep_levels=1)      vary: the coarse level stays, the finer ones are painted
    ImagePrompt(picture, mask=mask)          fill: white pixels of the mask are painted

The model paints codes in raster order, level by level, and sees only what comes before. So a filled region knows what
is above it and left of it, and of finer levels also the coarse codes of everything; it does not know what stays below
it and right of it within its level. `docs/sampling.md` says what helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, Level
from pipeline.sampling.decode import UNKNOWN


@dataclass(frozen=True)
class ImagePrompt:
    """A picture and one rule of what stays of it.

    Args:
        picture: of the image tokenizer's size.
        keep_rows: rows of codes of the finest level that stay, from the top; of coarser levels those that these cover.
        keep_levels: coarse levels that stay whole.
        mask: of the picture's size; a code is painted where its square holds a pixel of 128 or more.
    """

    picture: Image.Image
    keep_rows: int | None = None
    keep_levels: int | None = None
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        rules = [name for name in ("keep_rows", "keep_levels", "mask") if getattr(self, name) is not None]
        if len(rules) != 1:
            raise UserError(
                f"an image prompt needs one of keep_rows, keep_levels and mask, found {' and '.join(rules) or 'none'}"
            )


@torch.inference_mode()
def known_codes(tokenizer: ImageTokenizer, prompt: ImagePrompt, device: torch.device) -> Tensor:
    """The codes of all levels, int64 [N], coarse to fine; UNKNOWN (-1) where one is to be painted.

    Raises:
        UserError: picture or mask of another size, or more rows or levels than there are.
    """
    side = tokenizer.image_size
    for name, picture in (("picture", prompt.picture), ("mask", prompt.mask)):
        if picture is not None and picture.size != (side, side):
            found = f"{picture.width}×{picture.height}"
            raise UserError(f"image prompt: expected a {name} of {side}×{side} pixels, found {found}: resize it")
    pixels = np.array(prompt.picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
    codes = tokenizer.encode(torch.from_numpy(pixels)[None].to(device))
    stays = _stays(prompt, tokenizer.levels)
    parts = [c[0].masked_fill(~s.to(device), UNKNOWN) for c, s in zip(codes, stays, strict=True)]
    return torch.cat(parts)


def _stays(prompt: ImagePrompt, levels: Sequence[Level]) -> list[Tensor]:
    """bool [h*w] a level: which codes stay."""
    if prompt.keep_levels is not None:
        if len(levels) == 1:
            raise UserError("keep_levels needs an image tokenizer of several levels, found one: use keep_rows")
        if not 1 <= prompt.keep_levels < len(levels):
            raise UserError(f"keep_levels: expected 1 to {len(levels) - 1} levels, found {prompt.keep_levels}")
        return [torch.full((v.height * v.width,), i < prompt.keep_levels) for i, v in enumerate(levels)]
    if prompt.keep_rows is not None:
        finest = levels[-1].height
        if not 1 <= prompt.keep_rows < finest:
            raise UserError(f"keep_rows: expected 1 to {finest - 1} rows of codes, found {prompt.keep_rows}")
        kept = [prompt.keep_rows * level.height // finest for level in levels]
        return [torch.arange(v.height * v.width) < rows * v.width for v, rows in zip(levels, kept, strict=True)]
    assert prompt.mask is not None
    painted = np.asarray(prompt.mask.convert("L")) >= 128
    if not painted.any():
        raise UserError("mask: expected white pixels where the picture is to be painted, found none")
    return [torch.from_numpy(~_any_within(painted, level)).flatten() for level in levels]


def _any_within(painted: np.ndarray, level: Level) -> np.ndarray:
    """bool [h, w]: is any pixel of the code's square painted?"""
    height, width = painted.shape
    rows, columns = height // level.height, width // level.width
    return np.asarray(painted.reshape(level.height, rows, level.width, columns).any(axis=(1, 3)))
