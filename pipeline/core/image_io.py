"""Images as tensors, as PIL images and as PNG files. Imports no torch until tensors are asked for.

images = to_pil(tokenizer.decode(codes))      # float [B, 3, H, W] in [0, 1] -> B 8-bit images
pixels = to_tensor(images)                    # and back: float32 [B, 3, H, W] in [0, 1]
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB images of floats [B, 3, H, W], any device and precision: clamped to [0, 1], rounded to 8 bits."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size, at least one, in any mode, as float32 [n, 3, H, W] in [0, 1].

    Raises:
        UserError: they are of several sizes.
    """
    return _stacked(images).float() / 255


def to_uint8_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size, at least one, in any mode, as uint8 [n, 3, H, W], contiguous.

    Raises:
        UserError: they are of several sizes.
    """
    return _stacked(images).contiguous()


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file of the image, as Pillow writes it (`data/png.py` writes one that decodes faster)."""
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def from_png(content: bytes) -> Image.Image:
    """The RGB image of a PNG that this project wrote. Files from outside: `decode` in pipeline/data/images.py."""
    return Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB")


def _stacked(images: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, H, W], a view of channels-last memory."""
    import torch

    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} × {height}" for width, height in sizes[:3])
        raise UserError(f"images: expected one size, found {len(sizes)} ({shown}{', …' if len(sizes) > 3 else ''})")
    rgb = (image if image.mode == "RGB" else image.convert("RGB") for image in images)
    return torch.from_numpy(np.stack([np.asarray(image) for image in rgb])).permute(0, 3, 1, 2)
