"""All metrics of two sets of images, as rows that say what was measured with what on how many.

rows = compare_images(real, generated, config, seed)      # two iterables of PIL images
[row.as_json() for row in rows]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.distributed import device
from pipeline.core.errors import UserError
from pipeline.evaluation.reference_stats import reference_gaussian
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.extractors.registry import load_extractor
from pipeline.metrics.checks import checked_pair
from pipeline.metrics.clip_score import clip_scores, own_caption_ranks
from pipeline.metrics.frechet import Gaussian, frechet_deviation, frechet_distance, frechet_infinity
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.neighbours import nearest
from pipeline.metrics.precision_recall import membership

_RESAMPLES = 1000  # of a mean's bootstrap


@dataclass(frozen=True)
class Row:
    """One metric. `value` is None when it could not be measured; `warning` then says why."""

    metric: str
    compares: str  # which images with which
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


def warnings(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Each warning of rows of metrics.json once, with the metrics that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row["warning"]:
            about.setdefault(row["warning"], []).append(row["metric"])
    return [f"{', '.join(dict.fromkeys(metrics))}: {text}" for text, metrics in about.items()]


def compare_images(
    real: Iterable[Image.Image], generated: Iterable[Image.Image], config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every metric of two sets of images; the larger set is cut to the size of the smaller one."""
    extractor = load_extractor(config.extractor, device(), config.batch_size, config.weights)
    real_set = extractor(real, description="real images")
    return compare_features(real_set, extractor(generated, description="generated images"), config, seed)


def compare_features(
    real: FeatureSet, generated: FeatureSet, config: EvaluateConfig, seed: int, cache: Path | None = None
) -> list[Row]:
    """Every metric of two sets; the larger one is cut to the size of the smaller one, and to `config.samples`.

    Raises:
        UserError: a set is empty, or has features that are NaN or of other dimensions.
    """
    checked_pair(real.features, generated.features, at_least=2, reason="a covariance")  # before an empty set cuts both
    n = min(len(real), len(generated), config.samples or len(real))
    rows = compare_sets(real.take(slice(n)), generated.take(slice(n)), "generated, real", config, seed, cache)
    return rows + inception_rows(generated.take(slice(n)), "generated", config, seed)


def compare_sets(
    real: FeatureSet,
    generated: FeatureSet,
    compares: str,
    config: EvaluateConfig,
    seed: int,
    cache: Path | None = None,
) -> list[Row]:
    """Fréchet distance and FD∞, KID, precision, recall, density and coverage of two sets of features.

    `cache`: a folder that keeps the statistics of real sets. Raises as `compare_features` does.
    """
    checked_pair(real.features, generated.features, at_least=2, reason="a covariance")
    reference = reference_gaussian(real.features, cache)
    rows = [
        frechet_row(real, generated, compares, bootstraps=config.bootstraps, seed=seed, reference=reference),
        frechet_infinity_row(real, generated, compares, seed, reference),
    ]
    subset_size = min(config.kid_subset_size, min(len(real), len(generated)) // 2)

    def kid() -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        return kernel_distance(real.features, generated.features, config.kid_subsets, subset_size, generator)

    spread_of = f"± 1 standard deviation over {config.kid_subsets} subsets of {subset_size}"
    rows.append(_spread_row("KID", compares, "lower", real, generated, kid, spread_of))
    return rows + manifold_rows(real, generated, compares, config.neighbours, seed)


def manifold_rows(real: FeatureSet, generated: FeatureSet, compares: str, k: int, seed: int) -> list[Row]:
    names = ("precision", "recall", "density", "coverage")
    try:
        values = membership(real.features, generated.features, k)
    except UserError as error:
        return [_row(f"{name} k={k}", compares, None, "higher", real, generated, warning=str(error)) for name in names]
    rows = []
    for name in names:
        each: Tensor = getattr(values, name)
        interval = bootstrap_interval(each, seed)
        of = f"95 % confidence, {_RESAMPLES} bootstraps of its samples, the other set held fixed"
        row = _row(
            f"{name} k={k}",
            *(compares, each.mean().item(), "higher", real, generated),
            interval=interval,
            interval_of=of,
        )
        rows.append(row)
    return rows


def bootstrap_interval(
    values: Tensor, seed: int, statistic: Callable[[Tensor], Tensor] = torch.mean
) -> tuple[float, float]:
    """95 % confidence interval of the mean (or another statistic) of `values` `[n]`: percentiles over resamples with
    replacement (Efron & Tibshirani 1993, section 13.3)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack(
        [statistic(values[torch.randint(len(values), (len(values),), generator=generator)]) for _ in range(_RESAMPLES)]
    )
    low, high = torch.quantile(found.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def frechet_row(
    real: FeatureSet,
    generated: FeatureSet,
    compares: str,
    prefix: str = "",
    bootstraps: int = 0,
    seed: int = 0,
    reference: Gaussian | None = None,
    paired: bool = False,
) -> Row:
    """Fréchet distance, named after the extractor; it is called FID only on the Inception network of that name.

    `paired`: each generated image belongs to the real one of its place, as reconstructions do.
    """
    n, dimensions = min(len(real), len(generated)), real.features.shape[1]
    more: dict[str, Any] = {}
    if n < dimensions:
        more["warning"] = f"{n} samples for {dimensions} feature dimensions: biased upwards, compare at equal n only"
    value = None
    try:
        value = frechet_distance(real.features, generated.features, reference)
        if bootstraps > 1:
            generator = torch.Generator().manual_seed(seed)
            reach = 1.96 * frechet_deviation(real.features, generated.features, generator, bootstraps, paired)
            more["interval"] = (max(value - reach, 0.0), value + reach)
            of = f"{bootstraps} bootstraps{' of pairs' if paired else ''}"
            more["interval_of"] = f"95 % confidence at this n, normal, deviation of {of}"
    except UserError as error:
        more["warning"] = str(error)
    return _row(f"{prefix}{_frechet_name(generated)}", compares, value, "lower", real, generated, **more)


def frechet_infinity_row(
    real: FeatureSet, generated: FeatureSet, compares: str, seed: int, reference: Gaussian | None = None
) -> Row:
    name, generator = f"{_frechet_name(generated)}∞", torch.Generator().manual_seed(seed)
    try:
        value = frechet_infinity(real.features, generated.features, generator, reference=reference)
    except UserError as error:
        return _row(name, compares, None, "lower", real, generated, warning=str(error))
    n, dimensions = min(len(real), len(generated)), real.features.shape[1]
    warning = (
        f"{n} samples for {dimensions} feature dimensions: too few for a straight line" if n < dimensions else None
    )
    return _row(name, compares, value, "lower", real, generated, warning=warning)


def _frechet_name(features: FeatureSet) -> str:
    return "FID" if features.info.name == "inception-v3" else "FD"


def caption_rows(
    images: FeatureSet, captions: Tensor, compares: str, seed: int, ks: tuple[int, ...] = (1, 5, 10)
) -> list[Row]:
    """CLIP score and retrieval R@k of images and their captions (networks.ClipScorer)."""
    scores = clip_scores(images.features, captions)
    ranks = own_caption_ranks(images.features, captions)
    measured = [("CLIP score", scores)] + [(f"R@{k}", (ranks < k).double()) for k in ks if k < len(captions)]
    rows = []
    for name, values in measured:
        interval, of = bootstrap_interval(values, seed), f"95 % confidence, {_RESAMPLES} bootstraps"
        more = {"interval": interval, "interval_of": of}
        rows.append(_row(name, compares, values.mean().item(), "higher", None, images, **more))
    return rows


def inception_rows(images: FeatureSet, compares: str, config: EvaluateConfig, seed: int) -> list[Row]:
    """Inception Score, if the extractor classifies."""
    return [] if images.logits is None else [inception_row(images, compares, config, seed)]


def inception_row(images: FeatureSet, compares: str, config: EvaluateConfig, seed: int) -> Row:
    def score() -> tuple[float, float]:
        assert images.logits is not None
        return inception_score(images.logits, config.inception_splits, torch.Generator().manual_seed(seed))

    spread_of = f"± 1 standard deviation over {config.inception_splits} splits"
    return _spread_row("IS", compares, "higher", None, images, score, spread_of)


def pair_row(
    metric: str,
    compares: str,
    values: Tensor | UserError,
    n: int,
    seed: int,
    better: str = "higher",
    network: Lpips | None = None,
) -> Row:
    """The mean of a metric of n pairs of images (PSNR, SSIM, LPIPS): `values` `[n]`, or why there are none."""
    about: dict[str, Any] = {}
    if network:
        about = {"extractor": network.name, "weights_sha256": network.weights_sha256, "resize": "not resized"}
    if isinstance(values, UserError):
        return Row(metric, compares, None, better, n, n, warning=str(values), **about)
    if torch.isfinite(values).all():  # the PSNR of equal images is infinite
        about["interval"] = bootstrap_interval(values, seed)
        about["interval_of"] = f"95 % confidence, {_RESAMPLES} bootstraps"
    return Row(metric, compares, values.mean().item(), better, n, n, **about)


def distance_row(queries: FeatureSet, compares: str, training: FeatureSet, seed: int) -> Row:
    """Median distance in feature space from an image to its nearest training image; near 0 are copies."""
    distances, _ = nearest(queries.features, training.features)
    warning = None if len(queries) >= 10 else f"only {len(queries)} images"
    median = distances.median().item()
    name = "median distance to the nearest training image"
    interval, of = bootstrap_interval(distances, seed, torch.median), f"95 % confidence, {_RESAMPLES} bootstraps"
    more = {"interval": interval, "interval_of": of, "warning": warning}
    return _row(name, compares, median, "higher", training, queries, **more)


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
    extractor = generated.info
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
