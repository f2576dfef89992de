"""The Gumbel-softmax quantizer (Jang et al. 2016; Maddison et al. 2016), that of the discrete VAE (Ramesh et al. 2021).

    q(k | position) = softmax(logits)_k                        k: a code;  K: their number;  q̄: q's mean over a batch
    loss = kl_weight · Σ_positions KL(q ‖ uniform) / (3·H·W)  +  batch_entropy_weight · KL(q̄ ‖ uniform)
    KL(q ‖ uniform) = ln K − entropy(q)

In training the decoder sees a convex combination of the codes' vectors, softmax((logits + Gumbel noise) / τ), which
turns into one vector as the temperature τ falls. Codes are the argmax, without noise (appendix A.3 there).

Ours, and off in the dVAE's defaults: `logits: distance` scores a code by how near its vector lies, so that one set of
vectors serves encoder and decoder; `batch_entropy_weight` pulls the batch's mean posterior to uniform, which keeps
codes from dying early (each single posterior stays free to be sure).

To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import GumbelConfig, GumbelSettings
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer, best_code, entropy, nearest_code


def to_gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform numbers in [0, 1), in their memory."""
    # −ln(−ln u) in place (on CPUs several times quicker than exponential_); u = 0 gives −inf: a code not drawn.
    return uniform.log_().neg_().log_().neg_()


def gumbel_softmax(logits: Tensor, noise: Tensor, tau: float, hard: bool) -> Tensor:
    """A relaxed one-hot sample of the categorical, softmax((logits + Gumbel noise) / τ) over the last axis.

    `hard`: exactly one-hot, with the gradient of the relaxed one (straight-through).
    """
    soft = F.softmax((logits + noise).div_(tau), dim=-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)  # F.one_hot looks at the codes
    return one_hot + soft - soft.detach()


def distance_logits(z_BND: Tensor, codebook_KD: Tensor, log_scale: Tensor) -> Tensor:
    """−s·‖z − e_k‖² to each vector e_k of the codebook, [B,N,K], without ‖z‖², which a softmax ignores."""
    scale = log_scale.exp()  # on what is small, not on the logits
    bias_K = -scale * codebook_KD.square().sum(-1)
    codebook_DK = (2 * scale * codebook_KD).T.contiguous()  # see `mix`
    flat = torch.addmm(bias_K[None], z_BND.flatten(0, 1), codebook_DK)
    return flat.unflatten(0, z_BND.shape[:2])


def mix(weights_BNK: Tensor, codebook_KD: Tensor) -> Tensor:
    """Sums of the codebook's vectors with these weights, [B,N,D]."""
    # MKL is up to ten times as slow, forward and back, at products whose last axis is a few numbers long.
    mixed_DM = codebook_KD.T.contiguous() @ weights_BNK.flatten(0, 1).T
    return mixed_DM.T.unflatten(0, weights_BNK.shape[:2])


def kl_losses(
    logits_BNK: Tensor, config: GumbelSettings, step: int, values: int, step_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both KL terms of the module's docstring with their weights at step `step`, a scalar; and metrics.

    `values`: 3·H·W, the pixel values of an image, over which the KL of all its positions is shared out.
    """
    beta, batch_entropy_weight = config.kl_weight.at(step), config.batch_entropy_weight.at(step)
    with torch.set_grad_enabled((beta > 0 or batch_entropy_weight > 0) and torch.is_grad_enabled()):
        q_BNK = F.softmax(logits_BNK, dim=-1)
    with torch.set_grad_enabled(beta > 0 and torch.is_grad_enabled()):
        kl = kl_to_uniform(logits_BNK, q_BNK).sum(-1).mean()
    terms = beta * kl / values
    if batch_entropy_weight > 0:
        terms = terms + batch_entropy_weight * kl_of_mean_to_uniform(q_BNK, step_mean)
    return terms, {"kl_nats_per_code": kl.detach() / logits_BNK.shape[1]}


def kl_to_uniform(logits: Tensor, q: Tensor) -> Tensor:
    """KL(q ‖ uniform) = ln K − H(q) of the categoricals q = softmax(logits), both [..., K]; [...], in nats."""
    ln_K = math.log(logits.shape[-1])
    ln_sum = logits.amax(-1) - q.amax(-1).log()  # of exp(logits): that of the likeliest over its share
    return ln_K + torch.linalg.vecdot(q, logits) - ln_sum


def kl_of_mean_to_uniform(q: Tensor, step_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """KL(q̄ ‖ uniform), a scalar in nats, of the mean q̄ of the step's categoricals, of which q [..., K] are some.

    0 when the codes are used evenly, ln K when all collapse into one. `step_mean`: see `Quantizer`.
    """
    return math.log(q.shape[-1]) - entropy(step_mean(q.flatten(0, -2).mean(0)))


class GumbelQuantizer(Quantizer):
    """Logits over K codes for each position, by a 1×1 convolution or by distance to the codes' vectors."""

    draws = True

    def __init__(self, config: GumbelConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.config = config
        self.code_width = config.code_width
        self.codebook_sizes = [config.codebook_size]
        self.values_per_position = values_per_position
        self.asks_for_even_use = max(config.batch_entropy_weight.start, config.batch_entropy_weight.end) > 0
        distance = config.logits == "distance"
        self.project = nn.Linear(in_width, config.code_width if distance else config.codebook_size)
        # Vectors about as far apart as the encoder's first outputs are: far ones would win no position.
        self.codebook = nn.Parameter((0.3 if distance else 1.0) * torch.randn(config.codebook_size, config.code_width))
        if distance:
            self.log_scale = nn.Parameter(torch.zeros(()))

    def learned_codebooks(self) -> list[nn.Parameter]:
        return [self.codebook]

    def logits(self, features_BNC: Tensor) -> Tensor:
        """Unnormalised ln q(code | position), [B,N,K]."""
        z_BN: Tensor = self.project(features_BNC)
        return distance_logits(z_BN, self.codebook, self.log_scale) if self.config.logits == "distance" else z_BN

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        logits_BNK = self.logits(features_BNC)
        tau = self.config.temperature.at(step)
        noise_BNK = to_gumbel(self.uniform(logits_BNK, step))
        weights_BNK = gumbel_softmax(logits_BNK, noise_BNK, tau, hard=self.config.straight_through)
        values = logits_BNK.shape[1] * self.values_per_position
        loss, metrics = kl_losses(logits_BNK, self.config, step, values, self.step_mean)
        return Quantized(mix(weights_BNK, self.codebook), loss, metrics)

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        flat, shape = features_BNC.flatten(0, 1), features_BNC.shape[:2]
        if self.config.logits == "distance":
            return [nearest_code(self.project(flat), self.codebook).view(shape)]
        return [best_code(flat, self.project.weight, self.project.bias).view(shape)]

    def _samples(self, features_BNC: Tensor) -> list[Tensor]:
        """By the Gumbel-max trick (Maddison et al. 2014)."""
        logits_BNK = self.logits(features_BNC)
        return [(logits_BNK + to_gumbel(torch.rand_like(logits_BNK))).argmax(-1)]

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        return F.embedding(codes[0], self.codebook)
