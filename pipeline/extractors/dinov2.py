"""DINOv2 (Oquab et al. 2024) as an extractor, from a folder or transformers' cache: see `hf.py`."""

from __future__ import annotations

import torch

from pipeline.extractors.base import Extractor
from pipeline.extractors.hf import load_pretrained


def load(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """Raises UserError when `weights` is missing, or is not such a model."""
    return load_pretrained("dinov2", device, batch_size, weights)
