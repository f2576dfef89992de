"""Which setting of sampling generates best: images of every guidance × temperature × top-k, and their metrics.

All settings generate the same captions from the same random numbers, so they differ by nothing but the setting. They
are compared with *other* real images than those of the captions (`run_evaluation.py` says why); the best has the lowest
Fréchet distance. Images stay in sweep/<setting>.tar, so a stopped sweep resumes at the next setting.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import yaml

from pipeline.config.base import identity
from pipeline.config.evaluate import SweepConfig
from pipeline.config.generate import SamplingConfig
from pipeline.core import distributed, signals
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.progress import progress
from pipeline.data.shards import Sample, write_shard
from pipeline.evaluation.comparison import classified_rows, compare_sets
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import StoredImage, images_at
from pipeline.evaluation.results import SweepResult, SweepSetting
from pipeline.evaluation.run_evaluation import GENERATED_OTHER, RealImages
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.pipeline import Pipeline, sampling_dtype

VARIED = ("guidance", "temperature", "top_k")
BEST = "best.yaml"


def settings(config: SweepConfig, base: SamplingConfig) -> list[SamplingConfig]:
    """Every combination, on top of the run's own setting of sampling."""
    combinations = product(config.temperature, config.top_k, config.guidance)
    return [
        base.model_copy(update={"temperature": temperature, "top_k": top_k, "guidance": guidance})
        for temperature, top_k, guidance in combinations
    ]


class Sweep:
    """The sweep of one stage: array tasks share the settings to generate, `measure` does what is left.

    Raises:
        UserError: guidance other than 1 without caption dropout, or more samples than half of the training images.
    """

    def __init__(self, run: StageRun, config: SweepConfig, training: list[StoredImage], store: FeatureStore) -> None:
        if any(scale != 1 for scale in config.guidance) and run.config.transformer.caption_dropout == 0:
            raise UserError(
                "evaluate.sweep.guidance other than 1 needs a transformer trained with caption_dropout above 0"
            )
        if 2 * config.samples > len(training):
            raise UserError(
                f"evaluate.sweep.samples: expected at most half of the {len(training)} training images (the"
                f" other half is compared with), found {config.samples}; lower it"
            )
        self._run, self._store = run, store
        self._chosen = random.Random(run.seed).sample(training, config.samples)
        self._settings = settings(config, run.config.generate.sampling)
        self._pipeline: Pipeline | None = None

    def generate(self, which: int = 0, of: int = 1, on_piece: Callable[[], object] = lambda: None) -> None:
        """Images and features of the settings `which`, `which` + `of`, … that are not there yet.

        Args:
            on_piece: called after the images of each of these settings and each part of their features.
        """
        for setting in progress(self._settings[which::of], description="sweep", unit="setting"):
            signals.check()
            images = self._generated(setting)
            on_piece()
            self._store.extract(images, description="features of the sweep", on_part=on_piece)

    def measure(self, real: RealImages) -> SweepResult:
        """The metrics of every setting; `best.yaml` gets the best one, as a section of a pipeline's config."""
        run, config = self._run, self._run.config.evaluate.model_copy(update={"bootstraps": 0})
        _, other = real.own_and_other([image.key for image in self._chosen], run.seed)
        measured: list[SweepSetting] = []
        for setting in self._settings:
            signals.check()
            features = self._store.features(self._generated(setting), "features of the sweep")
            rows = compare_sets(other, features, "", config, run.seed, self._store.folder)
            rows += classified_rows(features, "", config, run.seed)
            measured.append(
                {
                    "guidance": setting.guidance,
                    "temperature": setting.temperature,
                    "top_k": setting.top_k,
                    "metrics": {row.metric: row.value for row in rows},
                }
            )
            run.add_output(self._path(setting))
        best = min(range(len(measured)), key=lambda i: _distance(measured[i]))
        chosen = self._settings[best].model_dump(mode="json", include=set(VARIED))
        overrides = {"generate": {"sampling": {name: chosen[name] for name in VARIED}}}
        write_atomic(run.directory / BEST, yaml.safe_dump(overrides, sort_keys=False))
        run.add_output(BEST, artifact=True)
        return {"settings": measured, "best": best, "compares": GENERATED_OTHER, "samples": len(self._chosen)}

    def _generated(self, setting: SamplingConfig) -> list[StoredImage]:
        path = self._path(setting)
        if path.is_file() and [image.key for image in images_at(path)] != [image.key for image in self._chosen]:
            path.unlink()  # of captions that an earlier version chose
        if not path.is_file():
            captions = [image.caption or "" for image in self._chosen]
            batch_size = self._run.config.generate.batch_size
            if self._pipeline is None:
                directory = self._run.input("transformer").parent
                device = distributed.device()
                dtype = sampling_dtype(setting.dtype, device)  # which no sweep varies
                self._pipeline = Pipeline.from_pretrained(directory, device, dtype=dtype)
            generated = self._pipeline.generate(captions, 1, self._run.seed, setting, batch_size=batch_size)
            images = [one.image for one in generated]
            samples = []
            for image, caption, source in zip(images, captions, self._chosen, strict=True):
                about = {"sampling": identity(self._pipeline.told(setting))}
                samples.append(Sample(source.key, png_bytes(image), caption, about))
            write_shard(path, samples)
        return images_at(path)

    def _path(self, setting: SamplingConfig) -> Path:
        name = f"guidance-{setting.guidance}-temperature-{setting.temperature}-top_k-{setting.top_k or 'all'}.tar"
        return self._run.directory / "sweep" / name


def _distance(setting: SweepSetting) -> float:
    """The setting's Fréchet distance; without one it is the worst."""
    distances = (value for metric, value in setting["metrics"].items() if metric.startswith(("FD (", "FID (")))
    value = next(distances)
    return float("inf") if value is None else value
