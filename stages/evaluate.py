"""Stage 7, evaluate: how good the generated pictures are, and the tokenizer's reconstructions.

Reads generate/samples (a picture painted for each of many captions) and generate/prompts.json (the grid), prepare and
image-tokenizer/model. Writes metrics.json: rows of figures with extractor, sample counts and warnings; the nearest
training picture of each picture in the grid; and some reconstructions. See pipeline/metrics/evaluation.py.
"""

from __future__ import annotations

import re

from pipeline import distributed
from pipeline.files import write_json
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.compare import Row
from pipeline.metrics.evaluation import (
    RealPictures,
    generated_rows,
    nearest_training_pictures,
    save_reconstructions,
    tokenizer_rows,
)
from pipeline.metrics.features import load_extractor
from pipeline.metrics.pictures import named_pictures
from pipeline.stage import StageRun, run_stage


def main(run: StageRun) -> None:
    if distributed.is_main():
        _evaluate(run)
    distributed.barrier()


def _evaluate(run: StageRun) -> None:
    config, seed = run.config.evaluate, run.config.seed
    prepare, generate = run.input("prepare"), run.input("generate")
    extractor = load_extractor(config.extractor, distributed.device(), config.batch_size)
    tokenizer = ImageTokenizer.from_pretrained(run.input("image-tokenizer") / "model").to(distributed.device())

    keys: list[str] = []
    if run.config.generate.samples:
        keys = [key for key, _ in named_pictures(generate / "samples")][: config.samples]
    real = RealPictures(prepare, set(keys), config, extractor)
    rows = generated_rows(generate / "samples", real, keys, extractor, config, seed) if keys else []
    rows += tokenizer_rows(tokenizer, real, extractor, config)
    shown = save_reconstructions(tokenizer, real, run.directory, config)
    figures = {
        "rows": [row.as_json() for row in rows],
        "nearest": nearest_training_pictures(generate, real, extractor),
        "reconstructions": shown,
    }
    write_json(run.directory / "metrics.json", figures)
    for file in ("metrics.json", *(entry["file"] for entry in shown)):
        run.add_output(file)
    run.tracker.log({_tracked_name(row): row.value for row in rows if row.value is not None}, step=0)


def _tracked_name(row: Row) -> str:
    """Of the characters that MLflow allows in names: `FD Lite0/generated - other real pictures`."""
    return re.sub(r"[^\w/ .:-]", "", f"{row.metric}/{row.compares.replace(', ', ' - ')}".replace("=", " "))


if __name__ == "__main__":
    run_stage("evaluate", main)
