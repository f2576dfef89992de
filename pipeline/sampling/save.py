"""Images as PNG files that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import UserError


def save_image(image: Image.Image, path: Path, about: dict[str, Any]) -> None:
    """Write a PNG whose text chunk `smalti` holds `about` as JSON (prompt, seed, settings, hash of the models)."""
    info = PngInfo()
    info.add_itxt("smalti", json.dumps(about, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="png", pnginfo=info)


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save_image` wrote into a PNG; None if it is another one."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.text["smalti"])  # type: ignore[attr-defined]
    except (OSError, KeyError, AttributeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_image(path: Path, what: str) -> Image.Image:
    """Raises UserError when there is no image at `path`."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{what}: expected an image at {path}, found none that opens ({error})") from error
