"""Losses between images and reconstructions: logit-Laplace likelihood, L1, L2.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.3. Terms on codes (the dVAE's KL,
commitment, entropy) are in the files of the quantizers that ask for them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.objective import ParameterGroup

EPSILON = 0.1  # keeps pixels away from 0 and 1, where the logit is infinite


def map_pixels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to [ε, 1 − ε], the support that the logit-Laplace density is fitted on."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unmap_pixels(x: Tensor) -> Tensor:
    """Pixels in [ε, 1 − ε] back to [0, 1]: the inverse of `map_pixels`."""
    return (x - EPSILON) / (1 - 2 * EPSILON)


def logit_laplace_nll(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """−ln f(x | μ, b) of the logit-Laplace density on (0, 1), element by element, in nats.

    f(x | μ, b) = 1 / (2 b x (1 − x)) · exp(−|logit(x) − μ| / b); all three of one shape.
    """
    return math.log(2) + ln_b + torch.log(x * (1 - x)) + (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


class ReconstructionLoss(nn.Module):
    """How far the decoder's output is from the images: what every objective starts from.

    Further terms on images (perceptual, adversarial) belong here: an objective knows none of them.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor, output: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss per pixel value, and metrics. `images` [B,3,H,W] in [0,1]; `output`: see `output_channels`."""
        loss = reconstruction_loss(self.kind, images, output)
        return loss, {"reconstruction": loss.detach()}

    def report(self, step: int) -> None:
        """See `Objective.report`."""
        return

    def adversaries(self) -> list[ParameterGroup]:
        """Its parameters that learn against the rest."""
        return []


def output_channels(kind: str) -> int:
    """Channels that a decoder gives per pixel: μ and ln b of three colours, or the colours themselves."""
    return 6 if kind == "logit_laplace" else 3


def reconstruction_loss(kind: str, images: Tensor, output: Tensor) -> Tensor:
    """Mean loss per pixel value. `images` [B,3,H,W] in [0,1]; `output` [B,6,H,W] (μ, ln b) or [B,3,H,W]."""
    if kind == "logit_laplace":
        mu, ln_b = output.chunk(2, dim=1)
        return logit_laplace_nll(map_pixels(images), mu, ln_b).mean()
    if kind == "l1":
        return F.l1_loss(output, images)
    return F.mse_loss(output, images)


def output_to_images(kind: str, output: Tensor) -> Tensor:
    """The decoder's output as images [B,3,H,W] in [0,1]."""
    return output_to_pixels(kind, output).clamp(0, 1)


def output_to_pixels(kind: str, output: Tensor) -> Tensor:
    """The same for losses, not clamped: beyond 0 and 1, where on white a third of the pixels lie, is a gradient too."""
    if kind == "logit_laplace":
        return unmap_pixels(torch.sigmoid(output[:, :3]))
    return output
