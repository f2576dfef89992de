"""Stage 7, evaluate: how good the generated images are, and the tokenizer's reconstructions.

Reads generate/samples (an image generated for each of many captions) and generate/prompts.json (the grid), prepare, and
the models. Writes metrics.json: rows of metrics with extractor, sample counts, intervals and warnings; the nearest
training image of each image in the grid; some samples and reconstructions; with evaluate.sweep also the metrics of
other settings of sampling, their images, and best.yaml, the best one as a section of a config. Array tasks share the
extraction of features and the generating of the sweep, the stage itself measures. See
pipeline/evaluation/run_evaluation.py and sweep.py.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.core.atomic_io import write_json
from pipeline.evaluation.comparison import Row
from pipeline.evaluation.feature_store import FeatureStore, trim
from pipeline.evaluation.run_evaluation import (
    ImageSets,
    RealImages,
    generated_rows,
    judged,
    nearest_training_images,
    reranked,
    save_reconstructions,
    save_samples,
    tokenizer_rows,
)
from pipeline.evaluation.sweep import Sweep
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun


def main(run: StageRun) -> None:
    config = run.config.evaluate
    extractor = load_extractor(config.extractor, distributed.device(), config.batch_size, config.weights)
    store = FeatureStore(config.feature_cache or run.config.runs / ".cache" / "features", extractor)
    sets = ImageSets(run.input("prepare"), run.input("generate"), config, run.config.generate.samples)
    judge = ClipScorer(config.clip, distributed.device(), config.batch_size) if config.clip else None
    sweep = Sweep(run, config.sweep, sets.training, store) if config.sweep else None
    share = run.array_task or (0, 1)
    for name, images in sets.all():
        store.extract(images, *share, description=f"features of {name} images")
    if judge and sets.generated:
        for images in (sets.generated, sets.own):
            FeatureStore(store.folder, judge.images).extract(images, *share, description="CLIP's features")
    if sweep:
        sweep.generate(*share)
    if run.array_task is None:
        _measure(run, sets, store, judge, sweep)
        trim(store.folder, config.feature_cache_gb)


def _measure(
    run: StageRun, sets: ImageSets, store: FeatureStore, judge: ClipScorer | None, sweep: Sweep | None
) -> None:
    config, seed, generate = run.config.evaluate, run.config.seed, run.input("generate")
    tokenizer = ImageTokenizer.from_pretrained(run.input("image-tokenizer") / "model").to(distributed.device())
    real = RealImages(sets, store)
    rows: list[Row] = []
    scores: list[float] | None = None
    if sets.generated:
        rows = generated_rows(sets.generated, real, store, config, seed)
        if judge:
            clip_rows, scores = judged(sets, judge, store.folder, seed)
            rows += clip_rows
    by_reranker = reranked(sets.generated)
    rows += tokenizer_rows(tokenizer, real, store, config, seed)
    metrics: dict[str, Any] = {
        "rows": [row.as_json() for row in rows],
        "nearest": nearest_training_images(generate, real, store),
        "judge": "the reranker" if by_reranker else "CLIP score" if scores else None,
        "samples": save_samples(sets.generated, by_reranker or scores, real, store, run.directory, config, seed),
        "reconstructions": save_reconstructions(tokenizer, real, run.directory, config),
    }
    if sweep:
        metrics["sweep"] = sweep.measure(real)
    write_json(run.directory / "metrics.json", metrics)
    shown = [entry["file"] for entry in (*metrics["samples"], *metrics["reconstructions"])]
    for file in ("metrics.json", *shown):
        run.add_output(file)
    run.tracker.log({_tracked_name(row): row.value for row in rows if row.value is not None}, step=0)


def _tracked_name(row: Row) -> str:
    """Of the characters that MLflow allows in names: `FD Lite0/generated - other real images`."""
    name = f"{row.metric}/{row.compares.replace(', ', ' - ')}".replace("=", " ").replace("∞", " infinity")
    return re.sub(r"[^\w/ .:-]", "", name)


if __name__ == "__main__":
    run_stage("evaluate", main)
