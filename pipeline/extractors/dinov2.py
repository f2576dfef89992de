"""DINOv2 (Oquab et al. 2024) as an extractor: features are the normalised class token. Weights: see `hf.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Dinov2Model

from pipeline.extractors.base import Extractor
from pipeline.extractors.hf import image_extractor, read_model, read_processor, square_side


class _ClassToken(nn.Module):
    """Images `[B, 3, side, side]` to the class token after the last normalisation `[B, hidden_size]`; no classes."""

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(pixel_values=x).pooler_output, None


def load(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """The extractor `dinov2`.

    Raises:
        UserError: `weights` is missing, or is not such a model.
    """
    folder, model = read_model(Dinov2Model, "dinov2", weights, "evaluate.extractor dinov2", "evaluate.weights")
    # Published for 224 pixels although its positions were trained for 518: the processor's crop decides.
    crop = read_processor(folder).get("crop_size")
    side = int(crop["height"]) if isinstance(crop, dict) else square_side(model.config.image_size)
    return image_extractor("dinov2", "DINOv2", folder, _ClassToken(model), side, device, batch_size)
