"""Comparisons of two sets of images by path, whoever made them: the work of `smalti evaluate --real A --fake B`.

sets = read_sets(real, fake, config, cache)                             # in every process
rows = sets.rows(config, seed, cache)                                   # in one
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.text import visible
from pipeline.evaluation.comparison import caption_rows, classified_rows, compare_features, compare_with_statistics
from pipeline.evaluation.evaluator_npz import Statistics, has_images, has_statistics, read_statistics
from pipeline.evaluation.feature_store import FeatureStore, check_same_extractor, is_feature_file, read_features
from pipeline.evaluation.image_sets import ImageSet, StoredImage, images_at, read_set
from pipeline.evaluation.rows import Row
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.extractors.registry import load_extractor

log = logging.getLogger(__name__)

Sizes = Counter[tuple[int, int]]  # how many images there are of each width and height


@dataclass(frozen=True)
class ReadSets:
    """Two sets to compare, and what the user should know about them."""

    real: FeatureSet | None  # None: of the real images there are statistics only
    fake: FeatureSet
    warnings: list[str]
    images: dict[str, ImageSet]  # what was read at a path that is no feature file, by "real" and "fake"
    statistics: Statistics | None = None  # of a reference file, the real side

    def rows(self, config: EvaluateConfig, seed: int, cache: Path) -> list[Row]:
        """Every metric of the two; where there are statistics, FID and sFID against them, of all fake images."""
        if self.statistics is None and self.real is not None:
            return compare_features(self.real, self.fake, config, seed, cache)
        if self.statistics is None:
            raise AssertionError("neither features nor statistics")
        rows = compare_with_statistics(self.statistics, self.fake, config, seed)
        if self.real is None:
            return rows + classified_rows(self.fake, "generated", config, seed)
        known = {row.metric for row in rows}
        return rows + [
            row for row in compare_features(self.real, self.fake, config, seed, cache) if row.metric not in known
        ]


def read_sets(real: Path, fake: Path, config: EvaluateConfig, cache: Path) -> ReadSets:
    """Both sets, from feature files where they are such; others are extracted into `cache`, ranks sharing the work.

    Collective: every process of the group calls it. Images of several sizes, and repeated ones, give a warning.

    Raises:
        UserError: there is nothing at a path, no image, or the sets come from different extractors.
    """
    for path in (real, fake):
        if not path.exists():
            raise UserError(f"{path}: expected a folder of images, a tar or a feature file, found nothing")
    store = None
    if not (_needs_no_network(real) and is_feature_file(fake)):
        extractor = load_extractor(config.extractor, distributed.device(), config.batch_size, config.weights)
        store = FeatureStore(cache, extractor)
    if has_statistics(fake) and not has_images(fake):
        raise UserError(f"{fake}: expected images or features as the fake side, found statistics; give it as --real")
    statistics = read_statistics(real) if has_statistics(real) else None
    found: list[FeatureSet | None] = []
    sizes: dict[str, Sizes] = {}
    images: dict[str, ImageSet] = {}
    repeats: list[str] = []
    for path, what in ((real, "real"), (fake, "fake")):
        if what == "real" and statistics and not has_images(path):
            found.append(None)
        elif store is None or is_feature_file(path):
            found.append(read_features(path))
        else:
            images[what] = read_set(path)
            features, sizes[what] = _extracted(images[what].images, f"{what} images", store)
            found.append(features)
            repeats += _repeats(images[what].images, what, store)
    of_real, of_fake = found
    if of_fake is None:
        raise AssertionError("the fake side has features")
    warnings = _mixed_sizes(sizes) + repeats
    if of_real:
        check_same_extractor(of_real, of_fake)
    else:
        warnings.append(f"{real} has statistics, no images: KID, precision and all else that needs these is left out")
    if statistics:
        warnings.append(
            f"statistics of {real}: how their images were resized is not told; here it is {of_fake.info.resize}"
        )
    return ReadSets(of_real, of_fake, warnings, images, statistics)


def _needs_no_network(real: Path) -> bool:
    return is_feature_file(real) or (has_statistics(real) and not has_images(real))


def _extracted(images: list[StoredImage], description: str, store: FeatureStore) -> tuple[FeatureSet, Sizes]:
    store.extract(images, distributed.rank(), distributed.world_size(), description)
    sizes = store.sizes(images)
    distributed.barrier()
    if distributed.is_main():  # joins the parts that the ranks have extracted
        store.features(images, description)
    distributed.barrier()
    return store.features(images, description), sizes


def _repeats(images: list[StoredImage], what: str, store: FeatureStore) -> list[str]:
    """A warning of images that are in a set under several names: each counts as often as it is there."""
    if not (repeats := store.repeats(images)):
        return []
    again, original = repeats[0]
    return [
        f"{what} images: {len(repeats):,} of {len(images):,} have the bytes of another one, and count again (the first:"
        f" {visible(again.name)}, the same as {visible(original.name)})"
    ]


def _mixed_sizes(sizes: dict[str, Sizes]) -> list[str]:
    """Warnings of mixed sizes: every image is resized on its own, and an enlarged one looks blurred to a network."""
    warnings = []
    for what, found in (*sizes.items(), ("real and fake", sum(sizes.values(), Sizes()))):
        if len(found) > 1 and (what != "real and fake" or all(len(other) == 1 for other in sizes.values())):
            shown = ", ".join(f"{count} of {width} × {height}" for (width, height), count in found.most_common(3))
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            warnings.append(
                f"{what} images: expected one size, found {len(found)} ({shown}{more}); each is resized on "
                "its own, which the metrics see"
            )
    return warnings


def captioned_rows(path: Path, config: EvaluateConfig, cache: Path, seed: int) -> list[Row]:
    """CLIP's metrics of the images at `path` that have captions; none without `config.clip`.

    Raises:
        UserError: no image has a caption.
    """
    if not config.clip:
        return []
    found = images_at(path)
    images = [image for image in found if image.caption]
    if not images:
        raise UserError(f"--clip: expected captions (a .txt beside each image) in {path}, found none")
    if bare := [image.name for image in found if not image.caption]:
        log.warning(
            "--clip: %d of %d images have no caption (a .txt beside each) and get no score, the first: %s",
            len(bare),
            len(found),
            visible(bare[0]),
        )
    scorer = ClipScorer(config.clip, distributed.device(), config.batch_size)
    embedded = FeatureStore(cache, scorer.images).features(images, "CLIP's features")
    captions = scorer.captions([image.caption or "" for image in images])
    return caption_rows(embedded, captions, "generated, their captions", config, seed)
