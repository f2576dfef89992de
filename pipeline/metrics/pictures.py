"""Pictures under names, from a folder of pictures, a tar, or a folder of tars (WebDataset: KEY.png, KEY.txt …)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def named_pictures(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGB picture) of every picture at `path`, sorted by file and, in tars, in the tar's order.

    Raises:
        UserError: nothing there, no picture in it, or one that cannot be read.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    files = [] if tars else sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not tars and not files:
        raise UserError(f"{path}: expected a folder of pictures, a tar or a folder of tars, found no picture or tar")
    for file in files:
        yield file.stem, decoded(file.read_bytes(), str(file))
    for tar_path in tars:
        yield from _in_tar(tar_path)


def decoded(content: bytes, where: str) -> Image.Image:
    """An RGB picture from a file's bytes; transparent parts become white."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
        picture.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: expected a picture, found something unreadable ({error}); remove it") from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _in_tar(path: Path) -> Iterator[tuple[str, Image.Image]]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, dot, suffix = member.name.partition(".")
                file = tar.extractfile(member) if f"{dot}{suffix}".lower() in _SUFFIXES else None
                if file:
                    yield key, decoded(file.read(), f"{path}: {member.name}")
    except tarfile.TarError as error:
        raise UserError(f"{path}: expected a tar of pictures, found a damaged one ({error}); write it again") from error
