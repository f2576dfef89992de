"""The stage graph: which stages there are, in which order, what each reads; and the config with a section for each.

This is the only place that knows the order. The local runner and the Slurm submitter both read it.
It imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.config import Config, identity, load_config, operational
from pipeline.data.config import PrepareConfig, TokenizeConfig
from pipeline.image_tokenizer.config import ImageTokenizerConfig
from pipeline.metrics.config import EvaluateConfig
from pipeline.report.config import ReportConfig
from pipeline.reranker.config import RerankerConfig
from pipeline.sampling.config import GenerateConfig
from pipeline.text_tokenizer_config import TextTokenizerConfig
from pipeline.tracking import TrackingConfig
from pipeline.transformer.config import TransformerConfig


class PipelineConfig(Config):
    """A whole pipeline: one section a stage. See `configs/` for complete examples."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run directory and the MLflow run")
    runs: Path = operational(Path("runs"), description="the run directory is <runs>/<name>")
    seed: int = Field(0, ge=0)
    processes: int | None = operational(
        None,
        ge=1,
        description="processes of each stage that trains or splits, on this machine; default: one a GPU, or one",
    )
    tracking: TrackingConfig = operational(TrackingConfig())

    prepare: PrepareConfig
    text_tokenizer: TextTokenizerConfig
    image_tokenizer: ImageTokenizerConfig
    tokenize: TokenizeConfig
    transformer: TransformerConfig
    reranker: RerankerConfig = RerankerConfig()
    generate: GenerateConfig
    evaluate: EvaluateConfig
    report: ReportConfig

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        if self.generate.candidates > 1 and not self.reranker.enabled:
            raise ValueError(
                f"generate.candidates={self.generate.candidates} needs a reranker to choose: set reranker.enabled=true"
            )
        return self

    @property
    def run_directory(self) -> Path:
        return self.runs / self.name

    def section(self, stage: str) -> Config:
        section: Config = getattr(self, stage.replace("-", "_"))
        return section


@dataclass(frozen=True)
class Stage:
    """One node of the graph."""

    name: str
    inputs: tuple[str, ...] = ()
    trains: bool = False  # runs on all GPUs of its job, as one process each
    shards: bool = False  # its work can be split into independent array tasks

    @property
    def module(self) -> str:
        """The module to run: `python -m stages.text_tokenizer`."""
        return f"stages.{self.name.replace('-', '_')}"


STAGES: tuple[Stage, ...] = (
    Stage("prepare"),
    Stage("text-tokenizer", inputs=("prepare",)),
    Stage("image-tokenizer", inputs=("prepare",), trains=True),
    Stage("tokenize", inputs=("prepare", "text-tokenizer", "image-tokenizer"), shards=True),
    Stage("transformer", inputs=("text-tokenizer", "image-tokenizer", "tokenize"), trains=True),
    Stage("reranker", inputs=("prepare", "text-tokenizer"), trains=True),
    Stage("generate", inputs=("prepare", "text-tokenizer", "image-tokenizer", "transformer", "reranker"), shards=True),
    Stage("evaluate", inputs=("prepare", "text-tokenizer", "image-tokenizer", "transformer", "generate"), shards=True),
    Stage(
        "report",
        inputs=("prepare", "text-tokenizer", "image-tokenizer", "tokenize", "transformer", "generate", "evaluate"),
    ),
)
STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    return STAGES[STAGE_NAMES.index(name)]


def stages_of(config: PipelineConfig) -> tuple[Stage, ...]:
    """The stages of this pipeline, in order: all but those whose section says `enabled: false`."""
    return tuple(stage for stage in STAGES if getattr(config.section(stage.name), "enabled", True))


def inputs_of(config: PipelineConfig, stage: Stage) -> tuple[str, ...]:
    """What `stage` reads in this pipeline."""
    names = {stage.name for stage in stages_of(config)}
    return tuple(name for name in stage.inputs if name in names)


def stage_identity(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """The part of the config that decides this stage's own work (its inputs' identities are apart)."""
    return {"seed": config.seed, stage.replace("-", "_"): identity(config.section(stage))}


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline config. A run directory's own config.yaml means that run, wherever it was moved to."""
    config = load_config(PipelineConfig, path, overrides)
    directory = Path(path).parent
    if Path(path).name == "config.yaml" and (directory / "run.json").exists():
        config = config.model_copy(update={"runs": directory.parent, "name": directory.resolve().name})
    return config
