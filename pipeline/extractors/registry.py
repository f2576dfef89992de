"""The extractors by name: `load_extractor("efficientnet-lite0", device)` is `load` of `efficientnet_lite0.py`.

    efficientnet-lite0     in a package, needs no download
    inception-v3           the network of published FID; its weights file by path or in torch.hub's cache
    clip, dinov2           a folder that transformers saved, or a name in its cache

To add one: a module here that is named like it (dashes are underscores) with a function `load(device, batch_size,
weights) -> Extractor`, and its name in `EXTRACTORS` of `pipeline/config/evaluate.py`.
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
    module = import_module(f"pipeline.extractors.{name.replace('-', '_')}")
    extractor: Extractor = module.load(device, batch_size, weights)
    return extractor
