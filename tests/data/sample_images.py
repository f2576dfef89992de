"""Real images, folders and tars for the data tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.prepare import PrepareConfig


def image(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """RGB noise that is different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, count: int, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"{number:05d}.png").write_bytes(encoded(image(number)))
        (folder / f"{number:05d}.txt").write_text(f"image number {number}")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def prepare_config(source: dict[str, Any], **values: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"source": source, "image_size": 8, "workers": 1, **values})


def folder_config(folder: Path, **values: Any) -> PrepareConfig:
    return prepare_config({"kind": "folder", "path": str(folder)}, **values)


def tree_bytes(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
