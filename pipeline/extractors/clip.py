"""CLIP (Radford et al. 2021) as an extractor: features are the projected image embeddings. Weights: see `hf.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from pipeline.extractors.base import Extractor
from pipeline.extractors.hf import image_extractor, read_model, square_side


class _ImageTower(nn.Module):
    """Images `[B, 3, side, side]` to embeddings `[B, projection_dim]`; CLIP has no classes."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model.vision_model
        self.projection = model.visual_projection

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.projection(self.model(pixel_values=x).pooler_output), None


def load(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """The extractor `clip`.

    Raises:
        UserError: `weights` is missing, or is not such a model.
    """
    folder, model = read_model(CLIPModel, "clip", weights, "evaluate.extractor clip", "evaluate.weights")
    return clip_images(folder, model, device, batch_size)


def clip_images(folder: Path, model: CLIPModel, device: torch.device, batch_size: int) -> Extractor:
    """The image tower of a loaded model as an extractor."""
    side = square_side(model.vision_model.config.image_size)
    return image_extractor("clip", "CLIP", folder, _ImageTower(model), side, device, batch_size)
