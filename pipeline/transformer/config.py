"""Config of the transformer: its shape, its loss, its training. Imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.train_config import DeepSpeedConfig, TrainingConfig


class TransformerShape(Config):
    """What decides the model's parameters (with the layout); saved in its config.json."""

    layers: int = Field(4, ge=1)
    width: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)
    mlp_width: int | None = Field(None, ge=8, description="hidden width of SwiGLU; None: 8/3 width, in steps of 64")
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the output of attention and MLP, in training")

    @model_validator(mode="after")
    def _check(self) -> TransformerShape:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        return self

    @property
    def hidden(self) -> int:
        return self.mlp_width or max(64, round(self.width * 8 / 3 / 64) * 64)


class TransformerConfig(TransformerShape):
    """Section `transformer`. Loss weights as Ramesh et al. 2021, section 2.2: text 1/8, image 7/8."""

    text_loss_weight: float = Field(0.125, ge=0)
    image_loss_weight: float = Field(0.875, gt=0)
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of captions replaced by pads in training; guidance needs some"
    )
    training: TrainingConfig = TrainingConfig(steps=10_000, batch_size=64)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
