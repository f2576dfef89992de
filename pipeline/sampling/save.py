"""Pictures as PNG files that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import UserError


def save_picture(picture: Image.Image, path: Path, about: dict[str, Any]) -> None:
    """Write a PNG whose text chunk `smalti` holds `about` as JSON (prompt, seed, settings, hash of the models)."""
    info = PngInfo()
    info.add_itxt("smalti", json.dumps(about, ensure_ascii=False))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", pnginfo=info)


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save_picture` wrote into a PNG; None if it is another one."""
    try:
        with Image.open(path) as picture:
            found = json.loads(picture.text["smalti"])  # type: ignore[attr-defined]
    except (OSError, KeyError, AttributeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_picture(path: Path, what: str) -> Image.Image:
    """Raises UserError when there is no picture at `path`."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{what}: expected a picture at {path}, found none that opens ({error})") from error
