"""Images that a client sends, through the same checks as those of `prepare`."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

from pipeline.config.prepare import FilterConfig
from pipeline.core.image_size import ImageSize
from pipeline.data.images import BadSample, cropped, decode
from pipeline.serving.refusal import Refusal

MOST_PIXELS = 2**24  # 4,096 x 4,096
_FILTERS = FilterConfig.model_validate({"max_pixels": MOST_PIXELS})


def upload(content: bytes, param: str, size: ImageSize) -> Image.Image:
    """Its largest part of the shape of `size`, as RGB of that size. Raises Refusal."""
    return cropped(_decoded(content, param, "white"), size)


def mask_of(content: bytes, size: ImageSize) -> Image.Image:
    """What is to be generated in white, grey of this size.

    As OpenAI has it: where the mask is transparent. In one without transparency: where it is white.

    Raises:
        Refusal: it is no image.
    """
    on_white, on_black = (_decoded(content, "mask", colour) for colour in ("white", "black"))
    transparency = ImageChops.difference(on_white, on_black).convert("L")  # 255 where nothing covers the ground
    mask = transparency if np.asarray(transparency).any() else on_white.convert("L")
    return cropped(mask, size)


def _decoded(content: bytes, param: str, background: str) -> Image.Image:
    try:
        return decode(content, filters=_FILTERS, background=background).image
    except BadSample as bad:
        message = f"{param}: expected a PNG, JPEG or WebP of at most {MOST_PIXELS:,} pixels, found: {bad.reason}"
        raise Refusal(400, message, "invalid_image", param) from bad
