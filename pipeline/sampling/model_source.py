"""Where the models of a `Pipeline` lie: in a run directory, or in a folder that `smalti export` wrote.

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
from pipeline.orchestration.run_directory import RunDirectory, config_of

EXPORT_RECORD = "pipeline.json"
_WEIGHTS = {  # stage -> the files that decide what it generates
    "text-tokenizer": ("tokenizer.json",),
    "image-tokenizer": ("model/model.safetensors", "model/config.json"),
    "transformer": ("model/model.safetensors", "model/config.json"),
}


@dataclass(frozen=True)
class Source:
    """Folders of the models, and what is known of them."""

    text_tokenizer: Path = Path()
    image_tokenizer: Path = Path()
    transformer: Path = Path()
    reranker: Path | None = None
    model_hash: str = ""  # of weights and tokenizers; the same for a run and its export
    guidance_trained: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # the run's own


def open_source(directory: Path) -> Source:
    """Raises UserError when there is neither a finished run nor an export."""
    record = directory / EXPORT_RECORD
    if record.is_file():
        return _of_export(directory, record)
    if not directory.is_dir():
        raise UserError(f"no run directory at {directory}: expected one that `smalti run` or `smalti export` made")
    return _of_run(directory)


def _of_export(directory: Path, record: Path) -> Source:
    known = read_json(record)
    return Source(
        directory / "text-tokenizer",
        directory / "image-tokenizer",
        directory / "transformer",
        directory / "reranker" if (directory / "reranker").is_dir() else None,
        known["model_hash"],
        known["guidance_trained"],
        SamplingConfig.model_validate(known["sampling"]),
    )


def _of_run(directory: Path) -> Source:
    config = load_pipeline(config_of(directory))
    runs = RunDirectory(directory)
    hashes = {}
    for stage, files in _WEIGHTS.items():
        manifest = runs.manifest(stage)
        if manifest is None:
            raise UserError(
                f"{directory}: the stage {stage} has not finished training: run `smalti run` to its end first"
            )
        hashes[stage] = {file: manifest["outputs"].get(file, {}).get("sha256") for file in files}
    ranker = directory / "reranker" / "model"
    return Source(
        directory / "text-tokenizer",
        directory / "image-tokenizer" / "model",
        directory / "transformer" / "model",
        ranker if config.reranker.enabled and runs.manifest("reranker") is not None else None,
        digest(hashes)[:16],
        config.transformer.caption_dropout > 0,
        config.generate.sampling,
    )
