"""Section `reranker` of the pipeline config. Imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.base import Config
from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError


class TowerConfig(Config):
    """The two towers; each is `layers` transformer layers of `width`."""

    width: int = Field(256, ge=8, le=1_000_000, description="channels of the residual stream")
    layers: int = Field(4, ge=1, le=10_000, description="transformer layers per tower")
    heads: int = Field(4, ge=1, description="attention heads; must divide width")
    patch_size: int = Field(4, ge=1, description="pixels of a patch's side; must divide prepare.image_size")
    dimensions: int = Field(256, ge=2, description="of the space that images and captions meet in")
    dropout: float = Field(0.1, ge=0, lt=1, description="in training")

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        return self


class RerankerConfig(Config):
    """An optional stage: which of several candidates fits its prompt best (Ramesh et al. 2021, section 2.6)."""

    enabled: bool = Field(False, description="whether the stage is part of the pipeline")
    clip: str | None = Field(
        None, description="folder of a pretrained CLIP (transformers' save_pretrained): measured and used, not trained"
    )
    model: TowerConfig = TowerConfig()
    training: TrainingConfig = TrainingConfig(
        steps=2000, batch_size=256, learning_rate=1e-3, weight_decay=0.1, warmup_steps=100, ema_decay=0.99
    )


def refuse_single_samples(training: TrainingConfig, processes: int) -> None:
    """Raises UserError when a process has one sample a pass: it is told from nothing, and the loss is 0 at once."""
    samples = training.micro_batch_size or training.batch_size // processes
    if samples < 2:
        raise UserError(
            "reranker.training: expected at least 2 samples per process and pass, since an image learns its caption"
            f" from the other ones there, found {samples}: raise batch_size or micro_batch_size, or use fewer processes"
        )
