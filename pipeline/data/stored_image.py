"""An image as `prepare` stores it (`prepare.storage`), and back to pixels.

    content = encode(image, "jpeg", jpeg_quality=95)
    decode(content)                    # uint8 [3, height, width]

Pillow does it: libraries that decode JPEG faster gain 0.2 ms an image (`python -m benchmarks.codecs formats FOLDER`).
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.prepare import FilterConfig, Storage
from pipeline.data import images, png

Pixels = NDArray[np.uint8]

# Of members of image shards. An image that stays in its tar is handed out as a PNG of what is kept of it.
EXTENSIONS: dict[Storage, str] = {"png": "png", "webp": "webp", "jpeg": "jpg", "in-place": "png"}

# Each image was looked at by `prepare`, under the limits of its filters, and has the same bytes.
_LOOKED_AT = FilterConfig.model_validate({"max_aspect_ratio": 1e9, "max_pixels": 1 << 40})


class Cut(NamedTuple):
    """The square of a user's image that is kept, in pixels of the whole, upright image."""

    left: int
    top: int
    side: int
    size: int  # pixels of each side that it is resized to


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
    if storage_of(content) == "png":
        return png.decode(content)
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")).convert("RGB")
    return _channels_first(image)


def cut_out(content: bytes, cut: Cut) -> Image.Image:
    """What is kept of a user's image, RGB. Raises ValueError when it cannot be decoded."""
    try:
        decoded = images.decode(content, filters=_LOOKED_AT, at_least=cut.size)
    except images.BadSample as bad:
        raise ValueError(f"{bad.reason} {bad.detail}") from bad
    return resized(decoded, cut)


def resized(decoded: images.Decoded, cut: Cut) -> Image.Image:
    """The square `cut` of an image, of which a half, a quarter or an eighth of the pixels may have been decoded."""
    image = decoded.image
    scale = round(decoded.whole[0] / image.width)  # it rounds sides up, so this is not quite a whole number
    right, bottom = min(image.width, (cut.left + cut.side) / scale), min(image.height, (cut.top + cut.side) / scale)
    box = (cut.left / scale, cut.top / scale, right, bottom)
    return image.resize((cut.size, cut.size), Image.Resampling.LANCZOS, box=box)


def _channels_first(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def storage_of(content: bytes) -> Storage:
    """What a file that `encode` made is, by its first bytes."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if content.startswith(b"RIFF") else "png"
