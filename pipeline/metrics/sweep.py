"""Which setting of sampling paints best: pictures of every guidance × temperature × top-k, and their figures.

All settings paint the same captions from the same random numbers, so they differ by nothing but the setting. They are
compared with *other* real pictures than those of the captions (`evaluation.py` says why); the best has the lowest
Fréchet distance. Pictures stay in sweep/<setting>.tar, so a sweep that was stopped goes on at the next setting.
"""

from __future__ import annotations

import io
import random
from itertools import product
from typing import Any

import yaml

from pipeline import distributed, stop
from pipeline.data.shards import Sample, write_shard
from pipeline.errors import UserError
from pipeline.files import write_atomic
from pipeline.metrics.compare import compare_sets, inception_rows
from pipeline.metrics.config import SweepConfig
from pipeline.metrics.evaluation import RealPictures
from pipeline.metrics.feature_store import FeatureStore
from pipeline.metrics.pictures import Picture, pictures_at
from pipeline.progress import progress
from pipeline.sampling.config import SamplingConfig
from pipeline.sampling.pipeline import Pipeline
from pipeline.stage import StageRun


def settings(config: SweepConfig, base: SamplingConfig) -> list[SamplingConfig]:
    """Every combination, on top of the run's own setting of sampling."""
    combinations = product(config.temperature, config.top_k, config.guidance)
    return [
        base.model_copy(update={"temperature": temperature, "top_k": top_k, "guidance": guidance})
        for temperature, top_k, guidance in combinations
    ]


def sweep(run: StageRun, config: SweepConfig, real: RealPictures, store: FeatureStore) -> dict[str, Any]:
    """Paint and measure every setting; `best.yaml` gets the best one, as a section of a pipeline's config.

    Returns:
        {"settings": [{guidance, temperature, top_k, figures: {metric: value}}], "best": index, "compares", "samples"}

    Raises:
        UserError: guidance other than 1 without caption dropout, or more samples than half of the training pictures.
    """
    if any(scale != 1 for scale in config.guidance) and run.config.transformer.caption_dropout == 0:
        raise UserError("evaluate.sweep.guidance other than 1 needs a transformer trained with caption_dropout above 0")
    if 2 * config.samples > len(real.samples):
        raise UserError(
            f"evaluate.sweep.samples: expected at most half of the {len(real.samples)} training pictures (the"
            f" other half is compared with), found {config.samples}; lower it"
        )
    chosen = random.Random(run.seed).sample(real.samples, config.samples)
    _, other = real.own_and_other([picture.key for picture in chosen], run.seed)
    pipeline = Pipeline.from_pretrained(run.input("transformer").parent, distributed.device())
    measured = []
    for setting in progress(settings(config, run.config.generate.sampling), description="sweep", unit="setting"):
        stop.check()
        painted = _painted(run, pipeline, chosen, setting)
        features = store.features(painted, "features of the sweep")
        rows = compare_sets(other, features, "", run.config.evaluate.model_copy(update={"bootstraps": 0}), run.seed)
        rows += inception_rows(features, "", run.config.evaluate, run.seed)
        figures = {row.metric: row.value for row in rows}
        measured.append({name: getattr(setting, name) for name in _VARIED} | {"figures": figures})
    best = min(range(len(measured)), key=lambda i: _distance(measured[i]))
    overrides = {"generate": {"sampling": {name: measured[best][name] for name in _VARIED}}}
    write_atomic(run.directory / "best.yaml", yaml.safe_dump(overrides, sort_keys=False))
    run.add_output("best.yaml")
    return {"settings": measured, "best": best, "compares": "generated, other real pictures", "samples": len(chosen)}


_VARIED = ("guidance", "temperature", "top_k")


def _distance(setting: dict[str, Any]) -> float:
    value: float = next(value for metric, value in setting["figures"].items() if metric.startswith(("FD (", "FID (")))
    return value


def _painted(run: StageRun, pipeline: Pipeline, chosen: list[Picture], setting: SamplingConfig) -> list[Picture]:
    top_k = setting.top_k or "all"
    path = run.directory / "sweep" / f"guidance-{setting.guidance}-temperature-{setting.temperature}-top_k-{top_k}.tar"
    if not path.is_file():
        captions = [picture.caption or "" for picture in chosen]
        batch_size = run.config.generate.batch_size
        pictures = pipeline.generate(captions, 1, run.seed, setting, batch_size=batch_size)
        samples = []
        for picture, caption, source in zip(pictures, captions, chosen, strict=True):
            content = io.BytesIO()
            picture.save(content, format="png")
            samples.append(Sample(source.key, content.getvalue(), caption, {"sampling": setting.model_dump()}))
        write_shard(path, samples)
    run.add_output(path)
    return pictures_at(path)
