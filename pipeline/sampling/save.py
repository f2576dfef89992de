"""Pictures as PNG files that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.files import atomic_path


def save_picture(picture: Image.Image, path: Path, about: dict[str, Any]) -> None:
    """Write a PNG whose text chunk `smalti` holds `about` as JSON (prompt, seed, sampling settings)."""
    info = PngInfo()
    info.add_itxt("smalti", json.dumps(about, ensure_ascii=False))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", pnginfo=info)
