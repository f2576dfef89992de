"""The metrics of a run: generated images against real ones, and reconstructions against their originals.

Generated images are compared with the real images of the same captions ("own"), which a model that
copies comes arbitrarily close to, and with other real images, where it cannot come closer than real
images do. That last distance, own against other real images at the same n, is the floor.
"""

from __future__ import annotations

import random
from pathlib import Path

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.core.seeds import hash64
from pipeline.data.catalog import Catalog
from pipeline.data.order import subset
from pipeline.evaluation.comparison import caption_rows, classified_rows, compare_sets
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import StoredImage, images_at, prepared_images
from pipeline.evaluation.pair_metrics import measure_pairs, pair_metrics, pair_row
from pipeline.evaluation.perturbed import perturbed_features
from pipeline.evaluation.rows import Row
from pipeline.evaluation.set_metrics import (
    AUTHENTICITY,
    NEAREST_TRAINING_IMAGE,
    PERTURBED,
    RECONSTRUCTED,
    TwoSets,
    row_of,
)
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.clip_score import clip_scores

GENERATED_OWN = "generated, real images of the same captions"
GENERATED_OTHER = "generated, other real images"
FLOOR = "real images, other real images (floor)"


class ImageSets:
    """The sets that are compared: known before any is measured, so that array tasks can share their features."""

    def __init__(self, prepare: Path, generate: Path, config: EvaluateConfig, samples: int, seed: int) -> None:
        self.generated: list[StoredImage] = []
        if samples:
            self.generated = images_at(generate / "samples")[: config.samples]
        wanted = {image.key for image in self.generated}
        self.training = _split(prepare, "train", wanted, config.training_images, seed)
        self.validation = _split(prepare, "val", wanted, config.reconstructions, seed)
        real = {image.key: image for image in (*self.validation, *self.training)}
        if strangers := [image.key for image in self.generated if image.key not in real]:
            raise UserError(
                f"generate/samples: expected keys of prepared images, found '{strangers[0]}' and "
                f"{len(strangers) - 1} more that prepare does not hold; run generate again"
            )
        self.own = [real[image.key] for image in self.generated]  # of the same captions

    def all(self) -> list[tuple[str, list[StoredImage]]]:
        """Name and images of each set that is not empty."""
        named = [("training", self.training), ("generated", self.generated), ("validation", self.validation)]
        return [(name, images) for name, images in named if images]


class RealImages:
    """Features of the training images, and which of them belong to which caption."""

    def __init__(self, sets: ImageSets, store: FeatureStore) -> None:
        self.samples, self.validation = sets.training, sets.validation
        self.training = store.features(self.samples, "features of training images")
        self._store = store

    def own_and_other(self, keys: list[str], seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Real images of these keys, in their order, and as many others as there are, drawn by `seed`."""
        index = {sample.key: i for i, sample in enumerate(self.samples)}
        held_out = {sample.key: sample for sample in self.validation}
        own = self.training.take([index[key] for key in keys if key in index])
        if len(own) < len(keys):
            extra = [held_out[key] for key in keys if key not in index]
            own = own.joined(self._store.features(extra, "features of validation images"))
        known = set(keys)
        rest = [i for i, sample in enumerate(self.samples) if sample.key not in known]
        chosen = sorted(random.Random(seed).sample(rest, min(len(rest), len(keys))))
        return own, self.training.take(chosen)


def generated_rows(
    images: list[StoredImage], real: RealImages, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every metric of the generated images, and of real images beside it."""
    generated = store.features(images, "features of generated images")
    own, other = real.own_and_other([image.key for image in images], seed)
    rows = compare_sets(own, generated, GENERATED_OWN, config, seed, store.folder)
    if len(other):
        n = slice(len(other))
        rows += compare_sets(other, generated.take(n), GENERATED_OTHER, config, seed, store.folder)
        rows += compare_sets(other, own.take(n), FLOOR, config, seed, store.folder)
    rows += [*classified_rows(generated, "generated", config, seed), *classified_rows(own, "real", config, seed)]
    measured = [("generated", generated)]
    if real.validation:
        unseen = store.features(real.validation, "features of validation images")
        measured.append(("real, never trained on", unseen))
    nearest = [
        row_of(metric, TwoSets(features, config, seed, real.training), compares)
        for metric in (NEAREST_TRAINING_IMAGE, AUTHENTICITY)
        for compares, features in measured
    ]
    return rows + [row for row in nearest if row is not None]


def clip_rows(
    sets: ImageSets, scorer: ClipScorer, folder: Path, config: EvaluateConfig, seed: int
) -> tuple[list[Row], list[float]]:
    """CLIP's metrics of the generated and of the real images of the same captions; and each generated one's score.

    `folder`: that of the feature cache.
    """
    store = FeatureStore(folder, scorer.images)
    captions = scorer.captions([image.caption or "" for image in sets.generated])
    generated = store.features(sets.generated, "CLIP's features of generated images")
    rows = caption_rows(generated, captions, "generated, their captions", config, seed)
    own = store.features(sets.own, "CLIP's features of real images")
    rows += caption_rows(own, captions, "real, their captions", config, seed)
    return rows, clip_scores(generated.features, captions).tolist()


def reranker_scores(images: list[StoredImage]) -> list[float] | None:
    """The run's reranker's score of each generated image with its caption; None if there was no reranker."""
    scores = [image.about.get("score") for image in images]
    found = [score for score in scores if score is not None]
    return found if found and len(found) == len(scores) else None


def tokenizer_rows(
    tokenizer: ImageTokenizer, real: RealImages, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """PSNR, SSIM, LPIPS (where its weights are) and Fréchet distance of reconstructions, by split; and pFID."""
    metrics = pair_metrics(config, next(tokenizer.parameters()).device)
    rows: list[Row | None] = []
    for split, samples in (("validation", real.validation), ("training", real.samples)):
        few = subset(config.reconstructions, len(samples), hash64("reconstructions", seed))
        samples = [samples[i] for i in few]
        if not samples:
            continue
        compares = f"{split} images, their reconstructions"
        values, rebuilt = measure_pairs(tokenizer, samples, metrics, store.extractor, config.batch_size)
        for metric, found in zip(metrics, values, strict=True):
            rows.append(pair_row(metric, found, compares, len(samples), seed))
        originals = store.features(samples, f"features of {split} images")
        rows.append(row_of(RECONSTRUCTED, TwoSets(rebuilt, config, seed, originals, paired=True), compares))
        for share, nearest in config.perturbations if split == "validation" else ():
            wrong = perturbed_features(tokenizer, samples, (share, nearest), store.extractor, config.batch_size, seed)
            told = f"{compares} with {100 * share:g} % of codes as one of the {nearest} nearest"
            rows.append(row_of(PERTURBED, TwoSets(wrong, config, seed, originals, paired=True), told))
    return [row for row in rows if row is not None]


def _split(prepare: Path, split: str, wanted: set[str], limit: int, seed: int) -> list[StoredImage]:
    """`limit` images of a split, drawn from all of it by `seed`, and those whose key is `wanted`, in its order."""
    catalog = Catalog(prepare, split)
    # Other ones than `generate` draws its captions by, or no other real images would be left beside theirs.
    drawn = subset(limit, len(catalog), hash64("evaluate", seed)).tolist()
    rows = {*drawn, *catalog.rows_of(wanted).values()}
    return prepared_images(catalog, sorted(rows))
