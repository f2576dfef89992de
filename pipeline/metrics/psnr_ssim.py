"""PSNR and SSIM: how close a reconstruction is to its image. Images are float `[n, C, H, W]` in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.image_size import images_at_once

WINDOW = 11  # pixels; SSIM needs images of at least so many
_SIGMA = 1.5
_IDENTICAL_DB = 100.0  # stands for infinity, which no mean and no JSON can have
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log₁₀ (1 / mean squared error), in dB, of each pair: `[n]`, at most 100.

    Equal images have 100, by custom.
    """
    return torch.cat([_psnr(x, y) for x, y in _pieces(images, reconstructions)])


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    return (-10 * (x - y).square().mean(dim=(1, 2, 3)).log10()).clamp(max=_IDENTICAL_DB)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of each pair, at most 1: `[n]`.

    Means, variances and covariance under an 11 × 11 Gaussian window (σ = 1.5) that stays inside the
    image, on each colour channel; averaged over channels and positions.
    """
    if min(images.shape[-2:]) < WINDOW:
        found = tuple(images.shape[-2:])
        raise UserError(f"SSIM: expected images of at least {WINDOW} × {WINDOW} pixels, found {found}")
    return torch.cat([_ssim(x, y) for x, y in _pieces(images, reconstructions)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.softmax(-(offset**2) / (2 * _SIGMA**2), dim=0)
    channels = x.shape[1]
    x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _pieces(images: Tensor, reconstructions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few pairs at a time in float64, of which SSIM makes a dozen copies. Raises UserError at what is no pair."""
    if images.shape != reconstructions.shape or images.ndim != 4 or len(images) == 0:
        raise UserError(
            "images and reconstructions: expected equal shapes [n, C, H, W] with n > 0, "
            f"found {tuple(images.shape)} and {tuple(reconstructions.shape)}"
        )
    at_once = images_at_once(*images.shape[-2:])
    for x, y in zip(torch.split(images, at_once), torch.split(reconstructions, at_once), strict=True):
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise UserError("images and reconstructions: expected numbers in [0, 1], found NaN or infinity")
        yield x.double(), y.double()
