"""Images to grids of discrete codes and back: `base.py` is the interface, each kind has its own module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.image_tokenizer.base import ImageTokenizer as ImageTokenizer


def __getattr__(name: str) -> Any:
    # On first use: `config.py` is read by the command line, which must not load torch.
    if name == "ImageTokenizer":
        from pipeline.image_tokenizer.base import ImageTokenizer

        return ImageTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
