"""How close a reconstruction is to its picture: PSNR and SSIM. Pictures are float `[n, C, H, W]` in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.metrics.features import FeatureSet

if TYPE_CHECKING:
    from pipeline.image_tokenizer.base import ImageTokenizer
    from pipeline.metrics.features import Extractor
    from pipeline.metrics.pictures import Picture

_WINDOW, _SIGMA = 11, 1.5
_BATCHES = 8  # of pictures and their reconstructions in memory at once
_C1, _C2 = 0.01**2, 0.03**2


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, pictures: list[Image.Image], batch_size: int = 64) -> list[Image.Image]:
    """Pictures of the tokenizer's size through its codes and back, rounded to 8 bits as they would be saved."""
    device = next(tokenizer.parameters()).device
    results: list[Image.Image] = []
    for batch in stacked(pictures).split(batch_size):
        decoded = tokenizer.decode(tokenizer.encode(batch.to(device))).clamp(0, 1)
        pixels = (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        results += [Image.fromarray(picture) for picture in pixels]
    return results


def measure_pairs(
    tokenizer: ImageTokenizer,
    pictures: Sequence[Picture],
    figures: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    extractor: Extractor,
    batch_size: int = 64,
) -> tuple[dict[str, Tensor | UserError], FeatureSet]:
    """Each of `figures` of each picture and its reconstruction, `[n]`, or why it cannot be measured; and the
    reconstructions' features. A few batches of pictures are in memory at a time, whatever n.

    Raises:
        UserError: pictures of different sizes.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in figures}
    refused: dict[str, UserError] = {}
    features: list[Tensor] = []
    for start in range(0, len(pictures), _BATCHES * batch_size):
        originals = [picture.image for picture in pictures[start : start + _BATCHES * batch_size]]
        rebuilt = reconstruct(tokenizer, originals, batch_size)
        pair = stacked(originals), stacked(rebuilt)
        for name, figure in figures.items():
            try:
                values[name].append(figure(*pair))
            except UserError as error:
                refused[name] = error
        features.append(extractor(rebuilt, len(rebuilt), "features of reconstructions").features)
    measured = {name: refused.get(name) or torch.cat(found) for name, found in values.items()}
    return measured, FeatureSet(torch.cat(features), None, extractor.credentials)


def stacked(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 `[n, 3, H, W]` in [0, 1]."""
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} × {height}" for width, height in sizes[:3])
        raise UserError(f"pictures: expected one size, found {len(sizes)} ({shown}{', …' if len(sizes) > 3 else ''})")
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def psnr(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log₁₀ (1 / mean squared error), in dB, of each pair: `[n]`.

    Identical pictures give infinity.
    """
    x, y = _checked(pictures, reconstructions)
    return -10 * (x - y).square().mean(dim=(1, 2, 3)).log10()


def ssim(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of each pair, at most 1: `[n]`.

    Means, variances and covariance under an 11 × 11 Gaussian window (σ = 1.5) that stays inside the
    picture, on each colour channel; averaged over channels and positions.
    """
    x, y = _checked(pictures, reconstructions)
    if min(x.shape[-2:]) < _WINDOW:
        raise UserError(
            f"SSIM: expected pictures of at least {_WINDOW} × {_WINDOW} pixels, found {tuple(x.shape[-2:])}"
        )
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    offset = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    window = torch.softmax(-(offset**2) / (2 * _SIGMA**2), dim=0)
    channels = x.shape[1]
    x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _checked(pictures: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    if pictures.shape != reconstructions.shape or pictures.ndim != 4 or len(pictures) == 0:
        raise UserError(
            "pictures and reconstructions: expected equal shapes [n, C, H, W] with n > 0, "
            f"found {tuple(pictures.shape)} and {tuple(reconstructions.shape)}"
        )
    if not (torch.isfinite(pictures).all() and torch.isfinite(reconstructions).all()):
        raise UserError("pictures and reconstructions: expected numbers in [0, 1], found NaN or infinity")
    return pictures.double(), reconstructions.double()
