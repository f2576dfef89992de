"""An extractor without weights: an image's pixels are its features."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.extractors.base import Extractor, ExtractorInfo


class Pixels(nn.Module):
    """An image's pixels as its features."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (images * self.gain).flatten(1), None


def pixels(side: int = 16) -> Extractor:
    """Pixels of `side` × `side` images."""
    return Extractor(ExtractorInfo("pixels", "pixels", "", "not resized"), Pixels(), side, (0.0,), (255.0,))
