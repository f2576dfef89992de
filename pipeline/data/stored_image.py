"""An image as `prepare` stores it (`prepare.storage`), and back to pixels.

    content = encode(image, "jpeg", jpeg_quality=95)
    decode(content)                    # uint8 [3, height, width]

Pillow does it: libraries that decode JPEG faster gain 0.2 ms an image (`python -m benchmarks.codecs formats FOLDER`).
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.prepare import Storage
from pipeline.data import png

Pixels = NDArray[np.uint8]

EXTENSIONS: dict[Storage, str] = {"png": "png", "webp": "webp", "jpeg": "jpg"}  # of members of image shards


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


def decode(content: bytes) -> Pixels:
    """uint8 [3, height, width] of a file that `encode` made.

    Raises:
        OSError, ValueError, zlib.error, SyntaxError: it is damaged.
    """
    if storage_of(content) == "png":
        return png.decode(content)
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")).convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def storage_of(content: bytes) -> Storage:
    """What a file that `encode` made is, by its first bytes."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if content.startswith(b"RIFF") else "png"
