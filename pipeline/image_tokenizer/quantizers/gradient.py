"""A codebook that learns by gradient: van den Oord et al. 2017, eq. 3.

    loss = β · ‖z − sg[e]‖²  +  codebook_weight · ‖sg[z] − e‖²

What it shares with the codebook of moving averages is in codebook.py. To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import CodebookConfig
from pipeline.image_tokenizer.quantizers.codebook import Codebook, CodebookQuantizer


class GradientCodebook(Codebook):
    """K vectors that are parameters; the second term of the loss pulls them to the encoder's vectors."""

    embedding: nn.Parameter

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Parameter(self._random_vectors())
        self._register_counts()

    def loss(self, z_BND: Tensor, e_BND: Tensor) -> Tensor:
        return super().loss(z_BND, e_BND) + self.config.codebook_weight * F.mse_loss(e_BND, z_BND.detach())


class GradientQuantizer(CodebookQuantizer):
    """Nearest vectors of codebooks that learn by gradient."""

    codebook_class = GradientCodebook

    def learned_codebooks(self) -> list[nn.Parameter]:
        return [cast(GradientCodebook, codebook).embedding for codebook in self.codebooks]
