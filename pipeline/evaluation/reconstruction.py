"""How close a reconstruction is to its picture: PSNR and SSIM. Pictures are float `[n, C, H, W]` in [0, 1]."""

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
    from pipeline.evaluation.image_sets import Picture
    from pipeline.extractors.base import Extractor
    from pipeline.image_tokenizer.base import ImageTokenizer

_BATCHES = 8  # of pictures and their reconstructions in memory at once


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
