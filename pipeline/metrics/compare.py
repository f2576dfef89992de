"""All figures of two sets of pictures, as rows that say what was measured with what on how many.

rows = compare_pictures(real, generated, config, seed)      # two iterables of PIL pictures
[row.as_json() for row in rows]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from pipeline.distributed import device
from pipeline.errors import UserError
from pipeline.metrics.config import EvaluateConfig
from pipeline.metrics.features import FeatureSet, load_extractor
from pipeline.metrics.frechet import frechet_distance
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.manifold import nearest, precision_recall_density_coverage


@dataclass(frozen=True)
class Row:
    """One figure. `value` is None when it could not be measured; `warning` then says why."""

    metric: str
    compares: str  # which pictures with which
    value: float | None
    better: str  # "lower" | "higher"
    n_real: int
    n_generated: int
    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    interval: tuple[float, float] | None = None
    interval_of: str | None = None
    warning: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_pictures(
    real: Iterable[Image.Image], generated: Iterable[Image.Image], config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every figure of two sets of pictures; the larger set is cut to the size of the smaller one."""
    extractor = load_extractor(config.extractor, device(), config.batch_size)
    real_set = extractor(real, description="real pictures")
    generated_set = extractor(generated, description="generated pictures")
    n = min(len(real_set), len(generated_set), config.samples or len(real_set))
    rows = compare_sets(real_set.take(slice(n)), generated_set.take(slice(n)), "generated against real", config, seed)
    return [*rows, inception_row(generated_set.take(slice(n)), "generated", config, seed)]


def compare_sets(
    real: FeatureSet, generated: FeatureSet, compares: str, config: EvaluateConfig, seed: int
) -> list[Row]:
    """Fréchet distance, KID, precision, recall, density and coverage of two sets of features."""
    k = config.neighbours
    rows = [frechet_row(real, generated, compares)]
    subset_size = min(config.kid_subset_size, min(len(real), len(generated)) // 2)

    def kid() -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        return kernel_distance(real.features, generated.features, config.kid_subsets, subset_size, generator)

    spread_of = f"± 1 standard deviation over {config.kid_subsets} subsets of {subset_size}"
    rows.append(_spread_row("KID", compares, "lower", real, generated, kid, spread_of))
    values: tuple[float | None, ...]
    try:
        figures = precision_recall_density_coverage(real.features, generated.features, k)
        values, warning = (figures.precision, figures.recall, figures.density, figures.coverage), None
    except UserError as error:
        values, warning = (None,) * 4, str(error)
    for name, value in zip(("precision", "recall", "density", "coverage"), values, strict=True):
        rows.append(_row(f"{name} k={k}", compares, value, "higher", real, generated, warning=warning))
    return rows


def frechet_row(real: FeatureSet, generated: FeatureSet, compares: str, prefix: str = "") -> Row:
    """Fréchet distance, named after the extractor; it is called FID only on the Inception network of that name."""
    n, dimensions = min(len(real), len(generated)), real.features.shape[1]
    warning = None
    if n < dimensions:
        warning = f"{n} samples for {dimensions} feature dimensions: biased upwards, compare at equal n only"
    try:
        value = frechet_distance(real.features, generated.features)
    except UserError as error:
        value, warning = None, str(error)
    return _row(f"{prefix}FD", compares, value, "lower", real, generated, warning=warning)


def inception_row(pictures: FeatureSet, compares: str, config: EvaluateConfig, seed: int) -> Row:
    def score() -> tuple[float, float]:
        return inception_score(pictures.logits, config.inception_splits, torch.Generator().manual_seed(seed))

    spread_of = f"± 1 standard deviation over {config.inception_splits} splits"
    return _spread_row("IS", compares, "higher", None, pictures, score, spread_of)


def pair_row(
    metric: str,
    compares: str,
    figure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
    others: torch.Tensor,
) -> Row:
    """The mean of `figure` (PSNR, SSIM) over pairs of pictures `[n, 3, H, W]`, with its 95 % confidence interval."""
    n = len(pictures)
    try:
        values = figure(pictures, others)
    except UserError as error:
        return Row(metric, compares, None, "higher", n, n, warning=str(error))
    mean = values.mean().item()
    error_95 = 1.96 * values.std().item() / n**0.5 if n > 1 else math.inf
    interval = (mean - error_95, mean + error_95) if math.isfinite(error_95) else None
    return Row(metric, compares, mean, "higher", n, n, interval=interval, interval_of="95 % confidence, normal")


def distance_row(queries: FeatureSet, compares: str, training: FeatureSet) -> Row:
    """Median distance in feature space from a picture to its nearest training picture; near 0 are copies."""
    distances, _ = nearest(queries.features, training.features)
    warning = None if len(queries) >= 10 else f"only {len(queries)} pictures"
    median = distances.median().item()
    name = "median distance to the nearest training picture"
    return _row(name, compares, median, "higher", training, queries, warning=warning)


def _spread_row(
    metric: str,
    compares: str,
    better: str,
    real: FeatureSet | None,
    generated: FeatureSet,
    measure: Callable[[], tuple[float, float]],
    spread_of: str,
) -> Row:
    try:
        mean, deviation = measure()
    except UserError as error:
        return _row(metric, compares, None, better, real, generated, warning=str(error))
    interval = (mean - deviation, mean + deviation)
    return _row(metric, compares, mean, better, real, generated, interval=interval, interval_of=spread_of)


def _row(
    metric: str,
    compares: str,
    value: float | None,
    better: str,
    real: FeatureSet | None,
    generated: FeatureSet,
    **more: Any,
) -> Row:
    extractor = generated.extractor
    return Row(
        metric=f"{metric} ({extractor.label})",
        compares=compares,
        value=value,
        better=better,
        n_real=len(real) if real else 0,
        n_generated=len(generated),
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        resize=extractor.resize,
        **more,
    )
