"""Pictures by name, from a folder of pictures, a tar, or a folder of tars (WebDataset: KEY.png, KEY.txt …).

A `Picture` knows where its bytes are, and reads them when asked: a set of any size takes a few hundred bytes a picture.
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
class Place:
    """Bytes in a file: all of it, or a member of a tar."""

    file: Path
    name: str  # for messages
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


@dataclass(frozen=True)
class Picture:
    key: str
    place: Place
    caption_place: Place | None = None
    about_place: Place | None = None

    def content(self) -> bytes:
        return self.place.read()

    @property
    def image(self) -> Image.Image:
        """RGB. Raises UserError if it cannot be read."""
        return decoded(self.content(), self.place.name)

    @property
    def caption(self) -> str | None:
        return self.caption_place.read().decode().strip() if self.caption_place else None

    @property
    def about(self) -> dict[str, Any]:
        """What the .json beside it says; empty if there is none."""
        found: dict[str, Any] = json.loads(self.about_place.read()) if self.about_place else {}
        return found


def pictures_at(path: Path) -> list[Picture]:
    """Every picture at `path`, sorted by file and, in tars, in the tar's order; none is decoded yet.

    Raises:
        UserError: nothing there, or no picture in it.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if tars:
        found = [picture for tar in tars for picture in _in_tar(tar)]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        found = [_in_folder(path, file) for file in files]
    if not found:
        raise UserError(f"{path}: expected a folder of pictures, a tar or a folder of tars, found no picture or tar")
    return found


def named_pictures(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGB picture) of every picture at `path`. Raises as `pictures_at` and `Picture.image` do."""
    for picture in pictures_at(path):
        yield picture.key, picture.image


def decoded(content: bytes, where: str) -> Image.Image:
    """An RGB picture from a file's bytes; transparent parts become white."""
    picture = _opened(content, where)
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # whatever the formats raise at damaged data
        raise _unreadable(where, error) from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def size_of(content: bytes, where: str) -> tuple[int, int]:
    """Width and height in pixels, from the file's head. Raises UserError if it has none."""
    return _opened(content, where).size


def _opened(content: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: expected a picture, found something unreadable ({error}); remove it")


def _in_folder(folder: Path, file: Path) -> Picture:
    caption = file.with_suffix(".txt")
    return Picture(
        key=file.relative_to(folder).with_suffix("").as_posix(),
        place=Place(file, str(file)),
        caption_place=Place(caption, str(caption)) if caption.is_file() else None,
    )


def _in_tar(path: Path) -> list[Picture]:
    pictures: dict[str, Place] = {}
    captions: dict[str, Place] = {}
    abouts: dict[str, Place] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = base.partition(".")
                key, suffix = f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()
                place = Place(path, f"{path}: {member.name}", member.offset_data, member.size)
                if suffix in _SUFFIXES and member.isfile():
                    pictures[key] = place
                elif suffix == ".txt":
                    captions[key] = place
                elif suffix == ".json":
                    abouts[key] = place
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: expected an uncompressed tar of pictures, found something else or a damaged one ({error});"
            " write it again"
        ) from error
    return [Picture(key, place, captions.get(key), abouts.get(key)) for key, place in pictures.items()]
