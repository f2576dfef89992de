"""The Gumbel-softmax quantizer (Jang et al. 2016; Maddison et al. 2016), as in the discrete VAE of Ramesh et al. 2021.

The functions here are the discrete VAE's own (`dvae.py`); the class offers them to every other architecture.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import GumbelConfig
from pipeline.image_tokenizer.losses import kl_of_mean_to_uniform, kl_to_uniform, sample_gumbel
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer, best_code, nearest_code


def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
    """A relaxed one-hot sample of the categorical, softmax((logits + Gumbel noise) / τ) over the last axis.

    `hard`: exactly one-hot, with the gradient of the relaxed one (straight-through).
    """
    soft = F.softmax((logits + sample_gumbel(logits)) / tau, dim=-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + soft - soft.detach()


def distance_logits(z_BND: Tensor, codebook_KD: Tensor, log_scale: Tensor) -> Tensor:
    """−s·‖z − e_k‖² to each vector e_k of the codebook, [B,N,K], without ‖z‖², which a softmax ignores."""
    bias_K = -codebook_KD.square().sum(-1)
    flat = torch.addmm(bias_K[None], z_BND.flatten(0, 1), 2 * codebook_KD.T) * log_scale.exp()
    return flat.unflatten(0, z_BND.shape[:2])


def kl_losses(logits_BNK: Tensor, config: Any, step: int, values: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted KL terms of step `step`, to be added to a loss a pixel value, and metrics.

    `values`: pixel values of an image, over which the KL of all its positions is shared out.
    """
    beta, batch_entropy_weight = config.kl_weight.at(step), config.batch_entropy_weight.at(step)
    with torch.set_grad_enabled((beta > 0 or batch_entropy_weight > 0) and torch.is_grad_enabled()):
        q_BNK = F.softmax(logits_BNK, dim=-1)
    with torch.set_grad_enabled(beta > 0 and torch.is_grad_enabled()):
        kl = kl_to_uniform(logits_BNK, q_BNK).sum(-1).mean()
    terms = beta * kl / values
    if batch_entropy_weight > 0:
        terms = terms + batch_entropy_weight * kl_of_mean_to_uniform(q_BNK)
    return terms, {"kl_nats_per_code": kl.detach() / logits_BNK.shape[1]}


class GumbelQuantizer(Quantizer):
    """Logits over K codes for each position, by a 1×1 convolution or by distance to the codes' vectors."""

    def __init__(self, config: GumbelConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.config = config
        self.code_width = config.code_width
        self.codebook_sizes = [config.codebook_size]
        self.values_per_position = values_per_position
        distance = config.logits == "distance"
        self.project = nn.Linear(in_width, config.code_width if distance else config.codebook_size)
        # Vectors about as far apart as the encoder's first outputs are: far ones would win no position.
        self.codebook = nn.Parameter((0.3 if distance else 1.0) * torch.randn(config.codebook_size, config.code_width))
        if distance:
            self.log_scale = nn.Parameter(torch.zeros(()))

    def logits(self, features_BNC: Tensor) -> Tensor:
        """Unnormalised ln q(code | position), [B,N,K]."""
        z_BN: Tensor = self.project(features_BNC)
        return distance_logits(z_BN, self.codebook, self.log_scale) if self.config.logits == "distance" else z_BN

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        logits_BNK = self.logits(features_BNC)
        tau = self.config.temperature.at(step)
        weights_BNK = gumbel_softmax(logits_BNK, tau, hard=self.config.straight_through)
        values = logits_BNK.shape[1] * self.values_per_position
        loss, metrics = kl_losses(logits_BNK, self.config, step, values)
        return Quantized(weights_BNK @ self.codebook, loss, metrics)

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        flat, shape = features_BNC.flatten(0, 1), features_BNC.shape[:2]
        if self.config.logits == "distance":
            return [nearest_code(self.project(flat), self.codebook).view(shape)]
        return [best_code(flat, self.project.weight, self.project.bias).view(shape)]

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        return F.embedding(codes[0], self.codebook)
