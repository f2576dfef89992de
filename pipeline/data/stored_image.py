"""An image as `prepare` stores it (`prepare.storage`), and back to pixels.

    content = encode(image, "jpeg", jpeg_quality=95)
    decode(content)                    # uint8 [3, height, width]

Pillow does it, but for reading our own JPEGs, where simplejpeg takes three quarters of its time and gives the same
pixels: both are libjpeg-turbo (`python -m benchmarks.codecs formats FOLDER`).
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.prepare import FilterConfig, Storage
from pipeline.core.image_size import ImageSize, height_width, image_size
from pipeline.data import images, png

Pixels = NDArray[np.uint8]

# Of members of image shards. An image that stays in its tar is handed out as a PNG of what is kept of it.
EXTENSIONS: dict[Storage, str] = {"png": "png", "webp": "webp", "jpeg": "jpg", "in-place": "png"}

# Each image was looked at by `prepare`, under the limits of its filters, and has the same bytes.
_LOOKED_AT = FilterConfig.model_validate({"max_aspect_ratio": 1e9, "max_pixels": 1 << 40})


class Cut(NamedTuple):
    """The part of a user's image that is kept, in pixels of the whole, upright image.

    Sides are as `packed` has them, so that four numbers say it.
    """

    left: int
    top: int
    sides: int  # of the part
    size: int  # of what it is resized to

    @classmethod
    def largest(cls, whole: tuple[int, int], size: ImageSize, where: tuple[float, float]) -> Cut:
        """See `images.largest_part`."""
        left, top, right, bottom = images.largest_part(whole, size, where)
        return cls(left, top, packed(bottom - top, right - left), packed(*height_width(size)))


def packed(height: int, width: int) -> int:
    """The side of a square; of another shape, the width + height · 2³²."""
    return width if height == width else width | height << 32


def unpacked(sides: int) -> tuple[int, int]:
    """Height and width of what `packed` made."""
    return sides >> 32 or sides, sides & (1 << 32) - 1


def encode(image: Image.Image, storage: Storage, jpeg_quality: int) -> bytes:
    """The file of an RGB image: exact as PNG and (lossless) WebP, smaller as JPEG without subsampled colors."""
    if storage == "png":
        return png.encode(image)
    buffer = io.BytesIO()
    if storage == "webp":
        image.save(buffer, "WEBP", lossless=True, method=0, quality=0)
    else:
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()


def decode(content: bytes, cut: Cut | None = None) -> Pixels:
    """uint8 [3, height, width] of a file that `encode` made, or of what is kept of a user's.

    Raises:
        OSError, ValueError, zlib.error, SyntaxError: it is damaged.
    """
    if cut is not None:
        return _channels_first(cut_out(content, cut))
    storage = storage_of(content)
    if storage == "png":
        return png.decode(content)
    if storage == "jpeg":
        return _channels_first(simplejpeg.decode_jpeg(content))
    return _channels_first(Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")).convert("RGB"))


def cut_out(content: bytes, cut: Cut) -> Image.Image:
    """What is kept of a user's image, RGB. Raises ValueError when it cannot be decoded."""
    try:
        decoded = images.decode(content, filters=_LOOKED_AT, at_least=image_size(unpacked(cut.size)))
    except images.BadSample as bad:
        raise ValueError(f"{bad.reason} {bad.detail}") from bad
    return resized(decoded, cut)


def resized(decoded: images.Decoded, cut: Cut) -> Image.Image:
    """The part `cut` of an image, of which a half, a quarter or an eighth of the pixels may have been decoded."""
    image = decoded.image
    scale = round(decoded.whole[0] / image.width)  # it rounds sides up, so this is not quite a whole number
    height, width = unpacked(cut.sides)
    right, bottom = min(image.width, (cut.left + width) / scale), min(image.height, (cut.top + height) / scale)
    box = (cut.left / scale, cut.top / scale, right, bottom)
    return image.resize(unpacked(cut.size)[::-1], Image.Resampling.LANCZOS, box=box)


def _channels_first(image: Image.Image | Pixels) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def storage_of(content: bytes) -> Storage:
    """What a file that `encode` made is, by its first bytes."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if content.startswith(b"RIFF") else "png"
