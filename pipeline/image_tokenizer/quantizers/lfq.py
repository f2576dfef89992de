"""Lookup-free quantization (Yu et al. 2023, MAGVIT-v2) and its spherical form BSQ (Zhao et al. 2024).

Each channel becomes its sign; d channels make 2^d codes. What keeps them in use is an entropy loss on a soft assignment
p(code | z) ∝ exp(2 z·c / τ): low for each position, high for the batch's mean. Written by hand: as the channels of a
position are independent, p is a product of d sigmoids, its entropy is d small terms, and the mean over the batch of
the joint of all d channels is one product of two [n, 2^(d/2)] matrices; the library makes an [n, 2^d] matrix, and on
several ranks divides the mean by their number without summing it.

To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import LFQConfig
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer, entropy


class LookupFreeQuantizer(Quantizer):
    """A 1×1 convolution to d channels, then their signs; channel 0 is a code's highest bit."""

    powers: Tensor

    def __init__(self, config: LFQConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.config = config
        self.code_width = config.bits
        self.codebook_sizes = [config.codebook_size]
        self.project = nn.Linear(in_width, config.bits)
        self.magnitude = config.bits**-0.5 if config.spherical else 1.0
        self.asks_for_even_use = config.entropy_weight * config.diversity > 0
        self.register_buffer("powers", 2 ** torch.arange(config.bits - 1, -1, -1), persistent=False)

    def _project(self, features_BNC: Tensor) -> Tensor:
        z_BNd: Tensor = self.project(features_BNC)
        return F.normalize(z_BNd, dim=-1) if self.config.spherical else z_BNd

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        config, z_BNd = self.config, self._project(features_BNC)
        c_BNd = torch.where(z_BNd > 0, self.magnitude, -self.magnitude)
        position, batch = self._entropies(z_BNd.flatten(0, 1))
        loss = config.commitment_weight * F.mse_loss(z_BNd, c_BNd)
        # ln K − the batch's entropy, so that a perfect code costs nothing
        loss = loss + config.entropy_weight * (position + config.diversity * (config.bits * math.log(2) - batch))
        metrics = {"entropy_per_position": position.detach(), "entropy_of_batch": batch.detach()}
        return Quantized(z_BNd + (c_BNd - z_BNd).detach(), loss, metrics)

    def _entropies(self, z_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy per position, and entropy of the mean over positions (and ranks), in nats."""
        logits_nd = 4 * self.magnitude * z_nd / self.config.entropy_temperature
        p_nd = logits_nd.sigmoid()
        position = (F.softplus(logits_nd) - p_nd * logits_nd).sum(-1).mean()
        half = self.config.bits // 2
        mean = _joint(p_nd[:, :half]).T @ _joint(p_nd[:, half:]) / len(p_nd)
        return position, entropy(self.step_mean(mean.flatten()))

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        return [((self._project(features_BNC) > 0).long() * self.powers).sum(-1)]

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        bits = (codes[0][..., None] & self.powers) != 0
        return torch.where(bits, self.magnitude, -self.magnitude)


def _joint(p_nd: Tensor) -> Tensor:
    """Probabilities [n, 2^d] of every combination of d independent bits."""
    joint = p_nd.new_ones(len(p_nd), 1)
    for p_n in p_nd.unbind(-1):
        joint = torch.stack([joint * (1 - p_n)[:, None], joint * p_n[:, None]], dim=-1).flatten(1)
    return joint
