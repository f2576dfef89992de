"""Config of sampling and of the generate stage. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config, operational


class SamplingConfig(Config):
    """How a code is drawn from its logits. The defaults draw from the model's own distribution."""

    temperature: float = Field(1.0, ge=0, le=10, description="0: always the most likely code")
    top_k: int | None = Field(None, ge=1, description="keep the k most likely codes")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the most likely codes that hold this probability")
    guidance: float = Field(
        1.0,
        ge=0,
        le=100,
        description="classifier-free guidance scale; 1: off; above 1 needs caption dropout",
    )
    dtype: Literal["fp32", "bf16"] = "fp32"


class GenerateConfig(Config):
    """Section `generate`: the prompts for the eye, and the captions whose pictures are measured."""

    training_prompts: list[str] = Field(default_factory=list, description="captions that are in the train split")
    new_prompts: list[str] = Field(default_factory=list, description="captions that are not in the train split")
    samples: int = Field(512, ge=0, description="pictures for evaluate, captions drawn from the train split")
    shard_size: int = Field(128, ge=1, description="pictures a tar shard; a restart goes on at the next shard")
    batch_size: int = operational(64, ge=1, description="pictures drawn at once; never changes them")
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> GenerateConfig:
        prompts = self.training_prompts + self.new_prompts
        if any(not prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty; write what the picture should show")
        twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' is listed twice; keep it once")
        return self
