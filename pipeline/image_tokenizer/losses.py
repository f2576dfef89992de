"""Likelihoods and the KL term of the discrete VAE's evidence lower bound.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 0.1  # keeps pixels away from 0 and 1, where the logit is infinite


def shrink(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to [ε, 1 − ε], the support that the logit-Laplace density is fitted on."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unshrink(x: Tensor) -> Tensor:
    """The inverse of `shrink`, cut to [0, 1]."""
    return ((x - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_nll(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """−ln f(x | μ, b) of the logit-Laplace density on (0, 1), element by element, in nats.

    f(x | μ, b) = 1 / (2 b x (1 − x)) · exp(−|logit(x) − μ| / b); all three of one shape.
    """
    return math.log(2) + ln_b + torch.log(x * (1 - x)) + (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


def reconstruction_loss(kind: str, images: Tensor, output: Tensor) -> Tensor:
    """Mean loss a pixel value. `images` [B,3,H,W] in [0,1]; `output` [B,6,H,W] (μ, ln b) or [B,3,H,W]."""
    if kind == "logit_laplace":
        mu, ln_b = output.chunk(2, dim=1)
        return logit_laplace_nll(shrink(images), mu, ln_b).mean()
    if kind == "l1":
        return F.l1_loss(output, images)
    return F.mse_loss(output, images)


def kl_to_uniform(logits: Tensor, q: Tensor) -> Tensor:
    """KL(q ‖ uniform) = ln K − H(q) of the categoricals q = softmax(logits), both [..., K]; [...], in nats."""
    ln_K = math.log(logits.shape[-1])
    return ln_K + (q * logits).sum(-1) - torch.logsumexp(logits, dim=-1)


def kl_of_mean_to_uniform(q: Tensor) -> Tensor:
    """KL(q̄ ‖ uniform), a scalar in nats, of the mean q̄ of all the categoricals q [..., K].

    0 when the codes are used evenly over the batch (this rank's part of it), ln K when all collapse into one.
    """
    mean = q.flatten(0, -2).mean(0)
    return math.log(q.shape[-1]) + torch.xlogy(mean, mean.clamp_min(1e-12)).sum()


def sample_gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `like`, from torch's global generator."""
    # −ln(−ln u) in place (on CPUs several times quicker than exponential_); u = 0 gives −inf: a code not drawn.
    return torch.rand_like(like).log_().neg_().log_().neg_()
