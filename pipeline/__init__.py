"""Smalti: train an image tokenizer and a text+image transformer, and generate images from prompts.

    from pipeline import Pipeline

    pipeline = Pipeline.from_pretrained("runs/openmoji")  # or a folder that `smalti export` wrote
    pipeline.generate(["red heart"])[0].image.save("heart.png")

The classes are imported, and torch with them, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.core.version import VERSION

if TYPE_CHECKING:
    from pipeline.image_tokenizer.base import ImageTokenizer
    from pipeline.sampling.pipeline import Pipeline
    from pipeline.text_tokenizer.bpe import TextTokenizer
    from pipeline.transformer.model import Transformer

__version__ = VERSION
__all__ = ["ImageTokenizer", "Pipeline", "TextTokenizer", "Transformer", "__version__"]

_MODULES = {
    "ImageTokenizer": "pipeline.image_tokenizer.base",
    "Pipeline": "pipeline.sampling.pipeline",
    "TextTokenizer": "pipeline.text_tokenizer.bpe",
    "Transformer": "pipeline.transformer.model",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'; it has {', '.join(_MODULES)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
