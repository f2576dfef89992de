"""`PipelineConfig`: a whole pipeline as one config, a section for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import Field, model_validator

from pipeline.config.base import Config, load_config, operational
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.generate import GenerateConfig
from pipeline.config.image_tokenizer import ImageTokenizerConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.report import ReportConfig
from pipeline.config.reranker import RerankerConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import TrainingConfig
from pipeline.config.transformer import TransformerConfig


@runtime_checkable
class Trained(Protocol):
    """A section whose stage trains a model."""

    training: TrainingConfig


@runtime_checkable
class Switchable(Protocol):
    """A section whose stage can be left out of the pipeline."""

    enabled: bool


class PipelineConfig(Config):
    """A whole pipeline: one section per stage. See `configs/` for complete examples."""

    name: str = operational(
        ..., pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run directory and of the MLflow run"
    )
    runs: Path = operational(Path("runs"), description="folder of run directories; this one is runs/name")
    seed: int = Field(0, ge=0, description="of the split, the order of samples, initial weights and sampling")
    processes: int | None = operational(
        None,
        ge=1,
        description="processes per stage that trains or splits, on this machine; None: one per GPU, or one",
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

    def section(self, name: str) -> Config:
        """The section of a stage; `name` as in the config file or as on the command line (`text-tokenizer`)."""
        section: Config = getattr(self, name.replace("-", "_"))
        return section

    def training(self, name: str) -> TrainingConfig | None:
        """How the stage of this section trains; None if it does not."""
        section: object = self.section(name)
        return section.training if isinstance(section, Trained) else None

    def is_enabled(self, name: str) -> bool:
        """Whether the stage of this section is part of the pipeline."""
        section: object = self.section(name)
        return section.enabled if isinstance(section, Switchable) else True


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline config. A run directory's own config.yaml means that run, wherever it was moved to."""
    config = load_config(PipelineConfig, path, overrides)
    directory = Path(path).parent
    if Path(path).name == "config.yaml" and (directory / "run.json").exists():
        config = config.model_copy(update={"runs": directory.parent, "name": directory.resolve().name})
    return config
