"""Images as PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import UserError

_CHUNK = "smalti"
Metadata = Mapping[str, object]  # what JSON can hold


def save_image(image: Image.Image, path: Path, metadata: Metadata) -> None:
    """Write a PNG whose text chunk `smalti` holds `metadata` as JSON (prompt, seed, settings, hash of the models)."""
    info = PngInfo()
    info.add_itxt(_CHUNK, json.dumps(metadata, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="png", pnginfo=info)


def read_metadata(path: Path) -> dict[str, object] | None:
    """What `save_image` wrote into a PNG; None for any other file."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.text[_CHUNK]) if isinstance(image, PngImageFile) else None
    except (OSError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_image(path: Path, what: str) -> Image.Image:
    """The image at `path`, read completely. Raises UserError, which begins with `what`, when there is none."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{what}: expected an image at {path}, found none that opens ({error})") from error
