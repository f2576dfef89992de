"""Bytes that claim to be an image -> an RGB image of one size, or the reason why not; and a hash of its looks.

`decode` is the one function that opens images from outside, whoever asks: `prepare`, `evaluate`, `reconstruct`,
`generate --image`. So the same file has the same pixels everywhere, and no format but those of `FORMATS` is tried.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config.prepare import FilterConfig
from pipeline.core.image_size import ImageSize, height_width

# Pillow's name of each format that is opened, and the extensions that promise it. Others are not even looked at:
# Pillow would hand an EPS to Ghostscript, whatever the file is called.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
ANY_SHAPE = FilterConfig.model_validate({"max_aspect_ratio": 1e9})  # bounds the number of pixels, nothing else

_WIDEST_SHEET = 4_096  # pixels, but for the gaps between its images
_ORIENTATION = 0x0112  # EXIF's; from 5 on, width and height change places
_HASH_SIDE = 32
_FREQUENCIES = np.arange(6)[:, None] * (2 * np.arange(_HASH_SIDE) + 1)
_COSINES = np.round(1_024 * np.cos(np.pi / (2 * _HASH_SIDE) * _FREQUENCIES)).astype(np.int64)  # rows of a DCT-II
# Close together around grey (128), where the means of most images lie.
_CHROMA_THRESHOLDS = 128 + np.array([-42, -30, -21, -14, -9, -5, -2, 2, 5, 9, 14, 21, 30, 42])


class BadSample(Exception):
    """Why a sample is not kept: a short `reason` that is counted, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Decoded:
    """An image, and how it came to be RGB."""

    image: Image.Image  # mode RGB
    conversions: tuple[str, ...]  # what had to be changed to get there
    whole: tuple[int, int]  # width and height of all of it, upright, of which `image` may have a fraction


def decode(
    content: bytes | None,
    extension: str = "",
    filters: FilterConfig = ANY_SHAPE,
    background: str = "white",
    *,
    at_least: ImageSize | None = None,
) -> Decoded:
    """Decode a still image to RGB: alpha on white, 16 bits to 8, CMYK, palette and grey to RGB, EXIF upright.

    Args:
        content: a file of one of `FORMATS`, whatever its name says.
        extension: what the name says, which is noted where it is wrong.
        background: the colour under transparent pixels.
        at_least: an upright JPEG whose sides all are twice those of this size, or four or eight times, is decoded at
            a half, a quarter or an eighth of its size, from fewer frequencies. None: whole.

    Raises:
        BadSample: missing, not an image, truncated, animated, too small, too long, or a decompression bomb.
    """
    with _reasons(content):
        image = _opened(content)
        _check_header(image, filters)
        whole, orientation = image.size, image.getexif().get(_ORIENTATION, 1) if image.format == "JPEG" else 1
        # Rounded up at its right and lower edge, an image that is turned afterwards would be shifted.
        if at_least is not None and image.format == "JPEG" and orientation == 1:
            image.draft(None, height_width(at_least)[::-1])
        image.load()
        conversions = []
        holds = _format(image)
        if extension and extension not in FORMATS[holds]:
            conversions.append(f"extension {extension} holds {holds}")
        upright = ImageOps.exif_transpose(image)
        if image.getexif().get(_ORIENTATION, 1) >= 5:
            whole = whole[::-1]
        rgb, conversion = to_rgb(upright, background)
        if conversion:
            conversions.append(conversion)
        return Decoded(rgb, tuple(conversions), whole)


def size_of(content: bytes | None) -> tuple[int, int]:
    """Width and height of the image that `decode` makes of it, in pixels, from the file's head. Raises BadSample."""
    with _reasons(content):
        image = _opened(content)
        _check_header(image, ANY_SHAPE)
        # Where a PNG has no EXIF before its pixels, Pillow decodes all of them to look for one behind.
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.height, image.width) if turned else image.size


@contextmanager
def _reasons(content: bytes | None) -> Iterator[None]:
    """Whatever Pillow raises at an image within the block, as a BadSample."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from half its own limit on; ours is checked before any pixel is decoded.
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("decompression bomb", str(error)) from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise BadSample("not an image", f"{len(content or b'')} bytes that are none of {known}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        if "truncat" in str(error).lower() or isinstance(error, (EOFError, SyntaxError)):
            raise BadSample("truncated image", str(error)) from error
        raise BadSample("undecodable image", str(error)) from error


def _opened(content: bytes | None) -> Image.Image:
    if not content:
        raise BadSample("missing image")
    return Image.open(io.BytesIO(content), formats=tuple(FORMATS))


def _format(image: Image.Image) -> str:
    """Its name in `FORMATS`."""
    return "JPEG" if image.format == "MPO" else image.format or ""  # several JPEGs in one file, as cameras write them


def _check_header(image: Image.Image, filters: FilterConfig) -> None:
    width, height = image.size
    if width * height > filters.max_pixels:
        raise BadSample("decompression bomb", f"{width}x{height} pixels, at most {filters.max_pixels} (max_pixels)")
    frames = getattr(image, "n_frames", 1)  # formats without animation do not have it
    if frames > 1 and image.format != "MPO":
        raise BadSample("animated image", f"{frames} frames")
    if min(width, height) < filters.min_side:
        raise BadSample("too small", f"{width}x{height}, at least {filters.min_side} (min_side)")
    if max(width, height) > filters.max_aspect_ratio * min(width, height):
        raise BadSample("aspect ratio", f"{width}x{height}, at most {filters.max_aspect_ratio} (max_aspect_ratio)")


def to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, str]:
    """An image of any mode as RGB, and what had to be changed for it, "" if nothing.

    Raises:
        BadSample: floating-point pixels.
    """
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image, ""
    if mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it.
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), "16-bit to 8-bit"
    if mode == "F":
        raise BadSample("undecodable image", "floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        under = Image.new("RGBA", rgba.size, background)
        return Image.alpha_composite(under, rgba).convert("RGB"), f"alpha on {background}"
    return image.convert("RGB"), f"{mode} to RGB"


def cropped(image: Image.Image, size: ImageSize, where: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The largest part of `image` that has the shape of `size`, resized to it.

    Resized once, with an antialiasing filter (Lanczos over the whole source area of each pixel).

    Args:
        where: x and y of the part within what the image leaves it, 0 to 1; 0.5: in the centre.
    """
    height, width = height_width(size)
    if image.size == (width, height):
        return image
    box = largest_part(image.size, size, where)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def largest_part(whole: tuple[int, int], size: ImageSize, where: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, right and lower edge, in pixels, of the largest part of an image that has the shape of `size`.

    Args:
        whole: width and height of the image.
        where: as `cropped` has it.
    """
    height, width = height_width(size)
    scale = min(whole[0] * height, whole[1] * width)  # of the part, times height and width
    part = max(1, round(scale / height)), max(1, round(scale / width))
    left, top = (round((length - own) * at) for length, own, at in zip(whole, part, where, strict=True))
    return left, top, left + part[0], top + part[1]


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that copies of an image of another size or compression share, but for a few.

    35 bits say which low frequencies of the luma's DCT lie above their median (Zauner 2010, "Implementation and
    benchmarking of perceptual image hash functions", section 3.2.1). That is blind to colour, so 2 x 14 bits count how
    many of 14 thresholds the mean Cb and Cr exceed. All in integers: the same on every machine.
    """
    small = np.asarray(image.convert("YCbCr").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BICUBIC))
    luma = small[:, :, 0].astype(np.int64)
    frequencies = (_COSINES @ luma @ _COSINES.T).ravel()[1:]
    bits = [frequencies > np.median(frequencies)]
    for channel in (1, 2):
        mean = int(small[:, :, channel].sum(dtype=np.int64)) // _HASH_SIDE**2
        bits.append(mean >= _CHROMA_THRESHOLDS)
    return int.from_bytes(np.packbits(np.concatenate(bits)).tobytes(), "big")


def grid(images: Iterable[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size beside and under each other, on white; smaller where `columns` of them are a wide sheet."""
    shown = [_at_most(image, _WIDEST_SHEET // columns) for image in images]
    width, height = shown[0].size
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """The image, made smaller where its longer side has more than `side` pixels."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BOX)
