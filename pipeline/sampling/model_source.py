"""Finds the models of a `Pipeline`: in a run directory, or in a folder that `smalti export` wrote.

runs/<name>/   text-tokenizer/  image-tokenizer/model/  transformer/model/  reranker/model/     (finished stages)
exported/      text-tokenizer/  image-tokenizer/        transformer/        reranker/           pipeline.json
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.base import digest
from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import load_pipeline
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory, config_of

EXPORT_RECORD = "pipeline.json"
_WEIGHTS = {  # stage -> the files that decide what it generates
    "text-tokenizer": ("tokenizer.json",),
    "image-tokenizer": ("model/model.safetensors", "model/config.json"),
    "transformer": ("model/model.safetensors", "model/config.json"),
}


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


def find_models(directory: Path) -> ModelSource:
    """The models of a finished run or of an export.

    Raises:
        UserError: `directory` is neither.
    """
    record = directory / EXPORT_RECORD
    if record.is_file():
        return _in_export(directory, record)
    if not directory.is_dir():
        raise UserError(f"no run directory at {directory}: expected one that `smalti run` or `smalti export` made")
    return _in_run(directory)


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


def _in_run(directory: Path) -> ModelSource:
    config = load_pipeline(config_of(directory))
    runs = RunDirectory(directory)
    hashes = {}
    for stage, files in _WEIGHTS.items():
        outputs = runs.usable(config, stage_named(stage))["outputs"]
        hashes[stage] = {file: outputs[file]["sha256"] if file in outputs else None for file in files}
    ranked = config.reranker.enabled and runs.manifest("reranker") is not None
    if ranked:
        runs.usable(config, stage_named("reranker"))
    return ModelSource(
        text_tokenizer=directory / "text-tokenizer",
        image_tokenizer=directory / "image-tokenizer" / "model",
        transformer=directory / "transformer" / "model",
        reranker=directory / "reranker" / "model" if ranked else None,
        model_hash=digest(hashes)[:16],
        guidance_trained=config.transformer.caption_dropout > 0,
        sampling=config.generate.sampling,
    )
