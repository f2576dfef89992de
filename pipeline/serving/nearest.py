"""The training images of a run that look most like an image, in the features in which its stage `evaluate` compares.

Only what is in the run is shown: where `evaluate` is finished and its features are still in the cache.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.evaluation.feature_store import FeatureStore, read_features
from pipeline.evaluation.image_sets import StoredImage
from pipeline.evaluation.run_evaluation import ImageSets
from pipeline.extractors.base import Extractor, FeatureSet
from pipeline.extractors.registry import load_extractor
from pipeline.metrics.neighbours import distances
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.serving.refusal import Refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Neighbour:
    """A training image; `distance` is Euclidean, of features."""

    caption: str
    distance: float
    png: bytes


class NearestImages:
    """Of one run; extractor and features are loaded when they are asked for first."""

    def __init__(self, directory: Path, config: PipelineConfig, device: torch.device) -> None:
        self._directory, self._config, self._device = directory.absolute(), config, device
        self._lock = threading.Lock()
        self._loaded: tuple[Extractor, FeatureSet, list[StoredImage]] | None = None

    @classmethod
    def of_run(cls, directory: Path, device: torch.device) -> NearestImages | None:
        """None: an export, or a run whose stage `evaluate` is not finished for its config."""
        if not (directory / "evaluate").is_dir():
            return None
        try:
            config = load_pipeline(config_of(directory))
            RunDirectory(directory).usable(config, stage_named("evaluate"))
        except UserError as error:
            log.info("nearest training images are not shown: %s", error)
            return None
        return cls(directory, config, device)

    def __call__(self, image: Image.Image, count: int) -> list[Neighbour]:
        """The `count` nearest, nearest first. For any thread. Raises Refusal: the cache has no features any more."""
        with self._lock, torch.inference_mode():
            extractor, training, images = self._loaded = self._loaded or self._load()
            features, *_ = extractor.network(extractor.input([image]))
            found = distances(features.double().cpu(), training.features.double())[0].sort()
        nearest = zip(found.values[:count].tolist(), found.indices[:count].tolist(), strict=True)
        return [
            Neighbour(images[index].caption or "", round(distance, 4), png_bytes(images[index].image))
            for distance, index in nearest
        ]

    def _load(self) -> tuple[Extractor, FeatureSet, list[StoredImage]]:
        config = self._config.evaluate
        extractor = load_extractor(config.extractor, self._device, config.batch_size, config.weights)
        cache = config.feature_cache or self._directory.parent / ".cache" / "features"
        samples, seed = self._config.generate.samples, self._config.seed
        sets = ImageSets(self._directory / "prepare", self._directory / "generate", config, samples, seed)
        folder = FeatureStore(cache, extractor).directory(sets.training)
        if not (folder / "about.json").is_file():
            message = (  # trimmed, or of training images that an earlier version chose
                "expected the features of the training images in the cache, found none: remove the run's folder"
                " evaluate, and give the run to `smalti run` again"
            )
            raise Refusal(404, message, "not_found")
        return extractor, read_features(folder), sets.training
