"""The metrics of pairs of images, here of originals and reconstructions: PSNR, SSIM, LPIPS.

To add one: a function `(images, reconstructions) -> [n]` of float images `[n, 3, H, W]` in [0, 1] in a module of
`pipeline/metrics/` that is named after the metric, and a line in `pair_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.core.image_io import to_tensor
from pipeline.core.iteration import batched
from pipeline.evaluation.image_sets import StoredImage
from pipeline.evaluation.intervals import BOOTSTRAP, bootstrap_interval
from pipeline.evaluation.reconstruction import images_in_memory, reconstruct
from pipeline.evaluation.rows import Better, Row
from pipeline.extractors.base import Extractor, FeatureSet
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.psnr_ssim import psnr, ssim


@dataclass(frozen=True)
class PairMetric:
    """One metric of pairs; `network` is named in its rows."""

    name: str
    better: Better
    measure: Callable[[Tensor, Tensor], Tensor]
    network: Lpips | None = None


def pair_metrics(config: EvaluateConfig, device: torch.device) -> list[PairMetric]:
    """What is measured under this config. Raises UserError when LPIPS is wanted and its weights are not there."""
    found = [PairMetric("PSNR (dB)", "higher", psnr), PairMetric("SSIM", "higher", ssim)]
    if config.lpips:
        network = Lpips.from_folder(config.lpips).to(device)
        found.append(PairMetric("LPIPS (VGG)", "lower", network.batched, network))
    return found


def measure_pairs(
    tokenizer: ImageTokenizer,
    images: Sequence[StoredImage],
    metrics: Sequence[PairMetric],
    extractor: Extractor,
    batch_size: int = 64,
) -> tuple[list[Tensor | UserError], FeatureSet]:
    """Of each metric its value for each image and its reconstruction, `[n]`, or why it cannot be measured; and the
    reconstructions' features. A few images are in memory at a time, the larger the fewer, whatever n: see
    `images_in_memory`.

    Raises:
        UserError: images of different sizes.
    """
    values: list[list[Tensor]] = [[] for _ in metrics]
    refused: dict[int, UserError] = {}
    features: list[Tensor] = []
    for some in batched(images, images_in_memory(tokenizer, batch_size)):
        originals = [image.image for image in some]
        rebuilt = reconstruct(tokenizer, originals, batch_size)
        pixels, rebuilt_pixels = to_tensor(originals), to_tensor(rebuilt)
        for i, metric in enumerate(metrics):
            try:
                values[i].append(metric.measure(pixels, rebuilt_pixels))
            except UserError as error:
                refused[i] = error
        features.append(extractor(rebuilt, len(rebuilt), "features of reconstructions").features)
    measured = [refused.get(i) or torch.cat(found) for i, found in enumerate(values)]
    return measured, FeatureSet(torch.cat(features), None, extractor.info)


def pair_row(metric: PairMetric, values: Tensor | UserError, compares: str, n: int, seed: int) -> Row:
    """The mean of a metric over n pairs, from its `values` `[n]`, or why there are none."""
    network = metric.network
    mean, interval, warning = None, None, None
    if isinstance(values, UserError):
        warning = str(values)
    else:
        mean, interval = values.mean().item(), bootstrap_interval(values, seed)
    return Row(
        metric=metric.name,
        compares=compares,
        value=mean,
        better=metric.better,
        n_real=n,
        n_generated=n,
        extractor=network.name if network else None,
        weights_sha256=network.weights_sha256 if network else None,
        resize="not resized" if network else None,
        interval=interval,
        interval_of=BOOTSTRAP if interval else None,
        warning=warning,
    )
