"""Section `tune` of the pipeline config: preference tuning. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config, operational
from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.core.errors import UserError


class TuneConfig(Config):
    """An optional stage: the transformer learns from rewards of what it generates (Shao et al. 2024, section 4.1).

    A step draws `training.batch_size` images, `group_size` of each prompt. Prompts are captions of the train split.
    """

    enabled: bool = Field(False, description="whether the stage is part of the pipeline; generate then uses its model")
    reward: Literal["judge", "reranker", "clip"] = Field(
        "judge",
        description="of an image beside its prompt: judge, 1 if it shows what the prompt says, else 0 (source shapes"
        " only); reranker, the run's own; clip, the model at `clip`",
    )
    clip: str | None = Field(
        None, min_length=1, description="folder of a pretrained CLIP (transformers' save_pretrained), for reward clip"
    )
    group_size: int = Field(16, ge=2, description="images of a prompt that are compared with each other")
    temperature: float = Field(1.0, gt=0, le=10, description="of drawing, and of the probabilities that are learned")
    kl_weight: float = Field(
        0.04, ge=0, description="of the Kullback-Leibler divergence from the transformer that tuning begins with"
    )
    draw_at_once: int = operational(64, ge=1, description="images drawn at a time; never changes them but by rounding")
    training: TrainingConfig = TrainingConfig(
        steps=200, batch_size=128, learning_rate=2e-5, schedule="constant", warmup_steps=10, weight_decay=0.0,
        evaluate_every=50, evaluate_batches=1, log_images_every=100, checkpoint_every=50,
    )  # fmt: skip
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check(self) -> TuneConfig:
        if (self.reward == "clip") != (self.clip is not None):
            raise ValueError(
                f"tune.clip goes with reward clip, found reward {self.reward} and clip {self.clip}: set both or none"
            )
        if (size := self.training.batch_size) % self.group_size:
            raise ValueError(
                f"tune.training.batch_size: expected a multiple of group_size {self.group_size}, found {size}: set it"
                f" to {max(size // self.group_size, 1) * self.group_size}, say"
            )
        if self.deepspeed.zero_stage == 3:
            raise ValueError(
                "tune.deepspeed.zero_stage: expected 0, 1 or 2, since images are drawn with the whole model, found 3"
            )
        return self


def refuse_split_groups(config: TuneConfig, processes: int) -> None:
    """Raises UserError when processes would share a prompt's images, which are compared with each other."""
    if config.training.batch_size % (processes * config.group_size):
        raise UserError(
            f"tune.training.batch_size: expected a multiple of {processes} processes × group_size {config.group_size},"
            f" so that each has whole groups, found {config.training.batch_size}: change it or group_size"
        )
