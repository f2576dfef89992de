"""Comparisons of two sets of images in every metric of the list (`set_metrics.py`).

rows = compare_images(real, generated, config, seed)      # two iterables of PIL images
[row.as_json() for row in rows]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.distributed import device
from pipeline.core.errors import UserError
from pipeline.core.seeds import hash64
from pipeline.data.order import subset
from pipeline.evaluation.evaluator_npz import Statistics
from pipeline.evaluation.rows import Row
from pipeline.evaluation.set_metrics import AgainstStatistics, CaptionedSet, OneSet, TwoSets, rows_of
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.registry import load_extractor
from pipeline.metrics.checks import checked_pair


def compare_images(
    real: Iterable[Image.Image], generated: Iterable[Image.Image], config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every metric of two sets of images; the larger set is cut as `compare_features` does it."""
    extractor = load_extractor(config.extractor, device(), config.batch_size, config.weights)
    real_set = extractor(real, description="real images")
    return compare_features(real_set, extractor(generated, description="generated images"), config, seed)


def compare_features(
    real: FeatureSet, generated: FeatureSet, config: EvaluateConfig, seed: int, cache: Path | None = None
) -> list[Row]:
    """Every metric of two sets; the larger one is cut to the size of the smaller one, and to `config.samples`.

    What is left of a set is drawn from all of it by `seed`, in the order that it has there.

    Raises:
        UserError: a set is empty, or has features that are NaN or of other dimensions.
    """
    checked_pair(real.features, generated.features, at_least=2, reason="a covariance")  # before an empty set cuts both
    n = min(len(real), len(generated), config.samples or len(real))
    real, generated = _drawn(real, n, seed), _drawn(generated, n, seed)
    rows = compare_sets(real, generated, "generated, real", config, seed, cache)
    return rows + classified_rows(generated, "generated", config, seed)


def _drawn(images: FeatureSet, n: int, seed: int) -> FeatureSet:
    """n of the images: their order may be that of classes, of which the first n would be a few."""
    return images if n >= len(images) else images.take(subset(n, len(images), hash64("compared", seed)).tolist())


def compare_sets(
    real: FeatureSet,
    generated: FeatureSet,
    compares: str,
    config: EvaluateConfig,
    seed: int,
    cache: Path | None = None,
) -> list[Row]:
    """The metrics of two sets as they are, from their features.

    `cache`: a folder that keeps the statistics of real sets. Raises as `compare_features` does.
    """
    checked_pair(real.features, generated.features, at_least=2, reason="a covariance")
    return rows_of(TwoSets(generated, config, seed, real, cache), compares)


def compare_with_statistics(
    reference: Statistics, generated: FeatureSet, config: EvaluateConfig, seed: int
) -> list[Row]:
    """FID and sFID of all images of a set against the statistics of a reference file, and nothing else.

    Raises:
        UserError: the features are no Inception's, whose statistics such files hold.
    """
    if generated.info.name != "inception-v3":
        raise UserError(
            f"{reference.where}: expected features of inception-v3, whose statistics it holds, found those of"
            f" {generated.info.name}: add --extractor inception-v3"
        )
    return rows_of(AgainstStatistics(generated, config, seed, reference), "generated, statistics of the reference")


def classified_rows(images: FeatureSet, compares: str, config: EvaluateConfig, seed: int) -> list[Row]:
    """The metrics of one set, from its class logits; none if the extractor is no classifier."""
    return rows_of(OneSet(images, config, seed), compares)


def caption_rows(images: FeatureSet, captions: Tensor, compares: str, config: EvaluateConfig, seed: int) -> list[Row]:
    """The metrics of images and their captions, from embeddings of both in one space (`ClipScorer`)."""
    return rows_of(CaptionedSet(images, config, seed, captions), compares)
