"""Images as files that say how they were made: PNG, JPEG or WebP, as the name's extension has it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import UserError
from pipeline.core.writable import check_writable
from pipeline.data.images import BadSample, decode

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SHEET = "grid.png"  # in a folder of generated images
_CHUNK = "smalti"  # of PNGs
_DESCRIPTION = 0x010E  # EXIF's, of JPEGs and WebPs
_LARGEST_EXIF = 60_000  # bytes of metadata that a JPEG holds
_LARGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # pixels
Metadata = Mapping[str, object]  # what JSON can hold


def check_output(path: Path) -> bool:
    """Whether `path` is an image file to write (True) or a folder, which is made; both can be written to.

    Raises:
        UserError: it is neither, or cannot be written.
    """
    try:
        is_file = not path.is_dir() and (path.suffix != "" or path.exists())
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        raise UserError(f"{path}: expected a place to write to, found: {error}; choose another") from error
    if is_file and path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{path}: expected a file that ends in {', '.join(FORMATS)}, or a folder, found"
            f" '{path.suffix}'; to have a folder of this name, make it first"
        )
    check_writable(path if is_file else path / SHEET)
    return is_file


def save_image(image: Image.Image, path: Path, metadata: Metadata) -> None:
    """Write the format that the name says, with `metadata` (prompt, seed, settings, hash of the models) as JSON in it.

    PNGs have it as the text `smalti`, others as EXIF's description. A JPEG holds 60 kB of it: the list `prompts` of
    a sheet that is longer is left out.

    Raises:
        UserError: the name says no format, or the format holds no image of this size.
    """
    kind = check_format(path, image.size)
    options: dict[str, object] = {}
    if kind == "PNG":
        options["pnginfo"] = _png_info(metadata)
    else:
        text = json.dumps(metadata)
        if len(text) > _LARGEST_EXIF:
            text = json.dumps({name: value for name, value in metadata.items() if name != "prompts"})
        exif = Image.Exif()
        exif[_DESCRIPTION] = text[:_LARGEST_EXIF]
        options |= {"exif": exif, "quality": 95}
    with atomic_path(path) as temporary:
        image.save(temporary, format=kind, **options)


def png_file(image: Image.Image, metadata: Metadata) -> bytes:
    """The bytes of the PNG that `save_image` writes."""
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=_png_info(metadata))
    return content.getvalue()


def _png_info(metadata: Metadata) -> PngInfo:
    info = PngInfo()
    info.add_itxt(_CHUNK, json.dumps(metadata, ensure_ascii=False))
    return info


def check_format(path: Path, size: tuple[int, int]) -> str:
    """Pillow's name of the format that the name says. Raises UserError: none, or it holds no image of this size."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: expected a name that ends in {', '.join(FORMATS)}, found '{path.suffix}'")
    if max(size) > _LARGEST_SIDE[kind]:
        raise UserError(
            f"{path}: expected at most {_LARGEST_SIDE[kind]:,} pixels a side ({kind}), found {size[0]:,} ×"
            f" {size[1]:,}: save it as .png"
        )
    return kind


def read_metadata(path: Path) -> dict[str, object] | None:
    """What `save_image` wrote into a file; None for any other file."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.text[_CHUNK] if isinstance(image, PngImageFile) else image.getexif()[_DESCRIPTION]
            found = json.loads(text)
    except Exception:  # Pillow raises some ten kinds at files of others
        return None
    return found if isinstance(found, dict) else None


def open_image(path: Path, what: str, background: str = "white") -> Image.Image:
    """The image at `path` as RGB, decoded as `prepare` does it.

    Raises:
        UserError: begins with `what`: there is none, or it cannot be decoded.
    """
    try:
        return decode(path.read_bytes(), background=background).image
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: expected an image at {path}, found none that opens ({error})") from error
    except BadSample as bad:
        found = f"{bad.reason}, {bad.detail}" if bad.detail else bad.reason
        raise UserError(f"{what}: expected an image at {path}, found none that opens ({found})") from bad
