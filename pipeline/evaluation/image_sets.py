"""Images by name, from a folder of images, a tar, or a folder of tars (WebDataset: KEY.png, KEY.txt …).

A `StoredImage` knows where its bytes are, and reads them when asked: a few hundred bytes per image, whatever its size.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.core.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class FileSlice:
    """A range of bytes in a file: all of it, or a member of a tar."""

    file: Path
    name: str  # for messages
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes, from disk."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


@dataclass(frozen=True)
class StoredImage:
    """An image on disk by its key, with its caption (.txt) and what else is known of it (.json), if they are there."""

    key: str
    slice: FileSlice
    caption_slice: FileSlice | None = None
    about_slice: FileSlice | None = None

    def content(self) -> bytes:
        """The image file's bytes."""
        return self.slice.read()

    @property
    def image(self) -> Image.Image:
        """RGB. Raises UserError if it cannot be read."""
        return decoded(self.content(), self.slice.name)

    @property
    def caption(self) -> str | None:
        """The content of the .txt beside it; None if there is none."""
        return self.caption_slice.read().decode().strip() if self.caption_slice else None

    @property
    def about(self) -> dict[str, Any]:
        """The content of the .json beside it; empty if there is none."""
        found: dict[str, Any] = json.loads(self.about_slice.read()) if self.about_slice else {}
        return found


def images_at(path: Path) -> list[StoredImage]:
    """Every image at `path`, sorted by file and, in tars, in the tar's order; none is decoded yet.

    Raises:
        UserError: nothing there, or no image in it.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if tars:
        found = [image for tar in tars for image in _in_tar(tar)]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        found = [_in_folder(path, file) for file in files]
    if not found:
        raise UserError(f"{path}: expected a folder of images, a tar or a folder of tars, found no image or tar")
    return found


def named_images(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGB image) of every image at `path`. Raises as `images_at` and `StoredImage.image` do."""
    for image in images_at(path):
        yield image.key, image.image


def decoded(content: bytes, where: str) -> Image.Image:
    """An RGB image from a file's bytes; transparent parts become white."""
    image = _opened(content, where)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # whatever the formats raise at damaged data
        raise _unreadable(where, error) from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def size_of(content: bytes, where: str) -> tuple[int, int]:
    """Width and height in pixels, from the file's head. Raises UserError if it has none."""
    return _opened(content, where).size


def _opened(content: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: expected an image, found something unreadable ({error}); remove it")


def _in_folder(folder: Path, file: Path) -> StoredImage:
    caption = file.with_suffix(".txt")
    return StoredImage(
        key=file.relative_to(folder).with_suffix("").as_posix(),
        slice=FileSlice(file, str(file)),
        caption_slice=FileSlice(caption, str(caption)) if caption.is_file() else None,
    )


def _in_tar(path: Path) -> list[StoredImage]:
    images: dict[str, FileSlice] = {}
    captions: dict[str, FileSlice] = {}
    abouts: dict[str, FileSlice] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = base.partition(".")
                key, suffix = f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()
                found = FileSlice(path, f"{path}: {member.name}", member.offset_data, member.size)
                if suffix in _SUFFIXES and member.isfile():
                    images[key] = found
                elif suffix == ".txt":
                    captions[key] = found
                elif suffix == ".json":
                    abouts[key] = found
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: expected an uncompressed tar of images, found something else or a damaged one ({error});"
            " write it again"
        ) from error
    return [StoredImage(key, png, captions.get(key), abouts.get(key)) for key, png in images.items()]
