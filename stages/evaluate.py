"""Stage evaluate: how good the generated images are, and the tokenizer's reconstructions.

Reads generate/samples (an image for each of many captions) and generate/prompts.json (the grid), prepare, and the
models. Writes metrics.json (pipeline/evaluation/results.py says what is in it), some samples and reconstructions as
files, and with evaluate.sweep the images of other settings of sampling and best.yaml, the best setting as a section
of a config. Of a run on the source shapes, a judge says which images show what their prompts say. Array tasks share the
extraction of features and the generating of the sweep; the stage itself measures.
"""

from __future__ import annotations

import re
from itertools import count

from pipeline.cli.stage import run_stage
from pipeline.config.prepare import ShapesSource
from pipeline.core import distributed
from pipeline.core.arithmetic import set_arithmetic
from pipeline.core.atomic_io import write_json
from pipeline.evaluation.examples import prompt_entries, save_reconstructions, save_samples
from pipeline.evaluation.feature_store import FeatureStore, trim
from pipeline.evaluation.judged import judged_rows
from pipeline.evaluation.results import FILE, Results
from pipeline.evaluation.rows import Row
from pipeline.evaluation.run_evaluation import (
    ImageSets,
    RealImages,
    clip_rows,
    generated_rows,
    reranker_scores,
    tokenizer_rows,
)
from pipeline.evaluation.sweep import Sweep
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun


def main(run: StageRun) -> None:
    config = run.config.evaluate
    set_arithmetic(tf32=False, deterministic=False)  # as tokenize, whose codes are measured
    extractor = load_extractor(config.extractor, distributed.device(), config.batch_size, config.weights)
    store = FeatureStore(config.feature_cache or run.config.runs / ".cache" / "features", extractor)
    sets = ImageSets(run.input("prepare"), run.input("generate"), config, run.config.generate.samples, run.seed)
    scorer = ClipScorer(config.clip, distributed.device(), config.batch_size) if config.clip else None
    sweep = Sweep(run, config.sweep, sets.training, store) if config.sweep else None
    which, of = run.array_task or (0, 1)
    pieces = count(1)

    def done() -> None:
        run.pieces_done(next(pieces))

    for name, images in sets.all():
        store.extract(images, which, of, f"features of {name} images", done)
    if scorer and sets.generated:
        for images in (sets.generated, sets.own):
            FeatureStore(store.folder, scorer.images).extract(images, which, of, "CLIP's features", done)
    if sweep:
        sweep.generate(which, of, done)
    if run.array_task is None:
        _measure(run, sets, store, scorer, sweep)
        trim(store.folder, config.feature_cache_gb)


def _measure(
    run: StageRun, sets: ImageSets, store: FeatureStore, scorer: ClipScorer | None, sweep: Sweep | None
) -> None:
    config, seed = run.config.evaluate, run.config.seed
    tokenizer = ImageTokenizer.from_pretrained(run.input("image-tokenizer") / "model").to(distributed.device())
    real = RealImages(sets, store)
    rows: list[Row] = []
    scores, scored_by = reranker_scores(sets.generated), "the reranker"
    if sets.generated:
        rows = generated_rows(sets.generated, real, store, config, seed)
        if scorer:
            more, by_clip = clip_rows(sets, scorer, store.folder, config, seed)
            rows += more
            if scores is None:
                scores, scored_by = by_clip, "CLIP score"
    rows += tokenizer_rows(tokenizer, real, store, config, seed)
    sources = run.config.prepare.all_sources
    if all(isinstance(source, ShapesSource) for source in sources) and config.judged_prompts:
        rows += judged_rows(run, tokenizer, sets.validation)
    results: Results = {
        "rows": [row.as_json() for row in rows],
        "nearest": prompt_entries(run.input("generate"), real, store),
        "scored_by": scored_by if scores else None,
        "samples": save_samples(sets.generated, scores, real, store, run.directory, config, seed),
        "reconstructions": save_reconstructions(tokenizer, real, run.directory, config, seed),
    }
    if sweep:
        results["sweep"] = sweep.measure(real)
    write_json(run.directory / FILE, results)
    run.add_output(FILE, artifact=True)
    for shown in (*results["samples"], *results["reconstructions"]):
        run.add_output(shown["file"], artifact=True)
    run.tracker.log({_tracked_name(row): row.value for row in rows if row.value is not None}, step=0)


def _tracked_name(row: Row) -> str:
    """The row's name in characters that MLflow allows: `FD Lite0/generated - other real images`."""
    name = f"{row.metric}/{row.compares.replace(', ', ' - ')}".replace("=", " ").replace("∞", " infinity")
    return re.sub(r"[^\w/ .:-]", "", name)


if __name__ == "__main__":
    run_stage("evaluate", main)
