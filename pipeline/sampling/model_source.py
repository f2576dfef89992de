"""Finds the models of a `Pipeline`: in a run directory, or in a folder that `smalti export` wrote.

runs/<name>/   text-tokenizer/  image-tokenizer/model/  transformer/model/  reranker/model/     (finished stages)
exported/      text-tokenizer/  image-tokenizer/        transformer/        reranker/           pipeline.json
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.base import digest
from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import load_pipeline
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import record as record_of
from pipeline.core.weights import model_files
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.training.checkpoint import step_of
from pipeline.training.consolidate import exported_step

log = logging.getLogger(__name__)
EXPORT_RECORD = "pipeline.json"
_STAGES = {"text-tokenizer": "tokenizer.json", "image-tokenizer": "model/", "transformer": "model/"}
# stage -> what decides what it generates: the outputs whose names begin so


@dataclass(frozen=True)
class ModelSource:
    """Folders of the models, and what is known of them."""

    text_tokenizer: Path = Path()
    image_tokenizer: Path = Path()
    transformer: Path = Path()
    reranker: Path | None = None
    model_hash: str = ""  # of weights and tokenizers; the same for a run and its export
    guidance_trained: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # the run's own
    step: int | None = None  # of the transformer, where it is not the finished one


def find_models(directory: Path, step: int | None = None) -> ModelSource:
    """The models of a finished run or of an export.

    Args:
        step: of a run, take the transformer as it was after this many steps, whose stage need not be finished.

    Raises:
        UserError: `directory` is neither, or has no checkpoint of that step.
    """
    record = directory / EXPORT_RECORD
    if record.is_file():
        if step is not None:
            raise UserError(f"--step: expected a run, found an export, {directory}, which has no checkpoints")
        return _in_export(directory, record)
    if not directory.is_dir():
        raise UserError(f"no run directory at {directory}: expected one that `smalti run` or `smalti export` made")
    return _in_run(directory, step)


def newest_step(directory: Path) -> int | None:
    """Of a run whose transformer is in training: the newest step of which there is an export or a complete checkpoint.

    Exports it, if it is not. None: the transformer is finished, or nothing is there yet. A damaged checkpoint is passed
    over with a warning.
    """
    if (directory / EXPORT_RECORD).is_file() or RunDirectory(directory).manifest("transformer") is not None:
        return None
    stage = directory / "transformer"
    exported = {step_of(path.parent) for path in stage.glob("exported/step-????????/config.json")}
    complete = {step_of(path.parent) for path in stage.glob("checkpoints/step-????????/manifest.json")}
    for step in sorted(exported | complete, reverse=True):
        try:
            exported_step(directory, "transformer", step)
        except UserError as error:
            log.warning("%s; an older one is taken", error)
        else:
            return step
    return None


def _in_export(directory: Path, record: Path) -> ModelSource:
    known = read_json(record)
    return ModelSource(
        text_tokenizer=directory / "text-tokenizer",
        image_tokenizer=directory / "image-tokenizer",
        transformer=directory / "transformer",
        reranker=directory / "reranker" if (directory / "reranker").is_dir() else None,
        model_hash=known["model_hash"],
        guidance_trained=known["guidance_trained"],
        sampling=SamplingConfig.model_validate(known["sampling"]),
    )


def _in_run(directory: Path, step: int | None) -> ModelSource:
    config = load_pipeline(config_of(directory))
    runs = RunDirectory(directory)
    hashes = {}
    generator = "tune" if config.tune.enabled and step is None else "transformer"
    transformer = directory / generator / "model"
    for stage, prefix in _STAGES.items():
        if stage == "transformer" and step is not None:
            transformer = exported_step(directory, stage, step)
            hashes[stage] = {name: record_of(transformer / name)["sha256"] for name in model_files(transformer)}
        else:
            made_by = generator if stage == "transformer" else stage
            outputs = runs.usable(config, stage_named(made_by))["outputs"]
            hashes[stage] = {name: output["sha256"] for name, output in outputs.items() if name.startswith(prefix)}
    ranked = config.reranker.enabled and runs.manifest("reranker") is not None
    if ranked:
        runs.usable(config, stage_named("reranker"))
    return ModelSource(
        text_tokenizer=directory / "text-tokenizer",
        image_tokenizer=directory / "image-tokenizer" / "model",
        transformer=transformer,
        reranker=directory / "reranker" / "model" if ranked else None,
        model_hash=digest(hashes)[:16],
        guidance_trained=config.transformer.caption_dropout > 0,
        sampling=config.generate.sampling,
        step=step,
    )
