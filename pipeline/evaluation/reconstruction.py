"""How close a reconstruction is to its image: PSNR and SSIM. Images are float `[n, C, H, W]` in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.extractors.base import FeatureSet

if TYPE_CHECKING:
    from pipeline.evaluation.image_sets import StoredImage
    from pipeline.extractors.base import Extractor
    from pipeline.image_tokenizer.base import ImageTokenizer

_BATCHES = 8  # of images and their reconstructions in memory at once


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: list[Image.Image], batch_size: int = 64) -> list[Image.Image]:
    """Images of the tokenizer's size through its codes and back, rounded to 8 bits as they would be saved."""
    device = next(tokenizer.parameters()).device
    results: list[Image.Image] = []
    for batch in stacked(images).split(batch_size):
        decoded = tokenizer.decode(tokenizer.encode(batch.to(device))).clamp(0, 1)
        pixels = (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        results += [Image.fromarray(image) for image in pixels]
    return results


def measure_pairs(
    tokenizer: ImageTokenizer,
    images: Sequence[StoredImage],
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    extractor: Extractor,
    batch_size: int = 64,
) -> tuple[dict[str, Tensor | UserError], FeatureSet]:
    """Each of `metrics` of each image and its reconstruction, `[n]`, or why it cannot be measured; and the
    reconstructions' features. A few batches of images are in memory at a time, whatever n.

    Raises:
        UserError: images of different sizes.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    refused: dict[str, UserError] = {}
    features: list[Tensor] = []
    for start in range(0, len(images), _BATCHES * batch_size):
        originals = [image.image for image in images[start : start + _BATCHES * batch_size]]
        rebuilt = reconstruct(tokenizer, originals, batch_size)
        pair = stacked(originals), stacked(rebuilt)
        for name, metric in metrics.items():
            try:
                values[name].append(metric(*pair))
            except UserError as error:
                refused[name] = error
        features.append(extractor(rebuilt, len(rebuilt), "features of reconstructions").features)
    measured = {name: refused.get(name) or torch.cat(found) for name, found in values.items()}
    return measured, FeatureSet(torch.cat(features), None, extractor.info)


def stacked(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as float32 `[n, 3, H, W]` in [0, 1]."""
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} × {height}" for width, height in sizes[:3])
        raise UserError(f"images: expected one size, found {len(sizes)} ({shown}{', …' if len(sizes) > 3 else ''})")
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
