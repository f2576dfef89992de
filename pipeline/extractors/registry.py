"""The extractors by name. To add one: a module here that is called like it, with `load`, and its name in `EXTRACTORS`.

extractor = load_extractor("efficientnet-lite0", device)       # pipeline/extractors/efficientnet_lite0.py
"""

from __future__ import annotations

from importlib import import_module

import torch

from pipeline.config.evaluate import EXTRACTORS
from pipeline.core.errors import UserError
from pipeline.extractors.base import Extractor


def load_extractor(name: str, device: torch.device, batch_size: int = 64, weights: str | None = None) -> Extractor:
    """The extractor of that name, frozen, on `device`. `weights`: a file or folder, where it does not find its own.

    Raises:
        UserError: no such extractor, or its weights are not there.
    """
    if name not in EXTRACTORS:
        raise UserError(f"evaluate.extractor: expected one of {', '.join(EXTRACTORS)}, found '{name}'")
    extractor: Extractor = import_module(f"pipeline.extractors.{name.replace('-', '_')}").load(
        device, batch_size, weights
    )
    return extractor
