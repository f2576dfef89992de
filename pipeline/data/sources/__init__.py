"""The sources by their `kind`. To add one: its config class in `config/prepare.py`, a module here, and a line below."""

from __future__ import annotations

from importlib import import_module

from pipeline.config.prepare import Source as SourceConfig
from pipeline.core.image_size import ImageSize
from pipeline.data.sources.base import Source

_CLASSES = {  # kind -> class, in the module here that is called like the kind; each brings its own libraries
    "openmoji": "OpenMoji",
    "folder": "Folder",
    "table": "Table",
    "webdataset": "WebDataset",
    "huggingface": "HuggingFace",
    "shapes": "Shapes",
}


def open_source(config: SourceConfig, image_size: ImageSize) -> Source:
    """The source that `config` describes; `image_size` is for sources that render.

    Raises:
        UserError: it is not there, or a package that it needs is not installed.
    """
    module = import_module(f"pipeline.data.sources.{config.kind}")
    source: Source = getattr(module, _CLASSES[config.kind])(config, image_size)
    return source
