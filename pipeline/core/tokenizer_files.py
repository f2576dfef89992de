"""Where the weights of another library's image tokenizer lie. Knows no torch."""

from __future__ import annotations

from pathlib import Path

_PATTERNS = ("model*.safetensors", "diffusion_pytorch_model.safetensors")


def tokenizer_files(path: Path) -> list[Path]:
    """`path` itself, or what such a folder holds: one file or several, or OpenAI's two halves; none: no weights."""
    if not path.is_dir():
        return [path]
    found = next((files for pattern in _PATTERNS if (files := sorted(path.glob(pattern)))), [])
    return found or [file for half in ("encoder", "decoder") for file in sorted(path.glob(f"{half}.*"))]
