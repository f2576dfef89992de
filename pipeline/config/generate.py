"""Config of sampling and of the generate stage. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config, added, operational

# Settings that not every model follows, and the orders of those that do.
_FOLLOWED_BY = {
    "passes": ("any",),
    "schedule": ("any",),
    "pass_order": ("any",),
    "temperature_end": ("any", "scale"),
    "speculate": ("raster",),
}


class SamplingConfig(Config):
    """How a code is drawn from its logits. The defaults draw from the model's own distribution."""

    temperature: float = Field(1.0, ge=0, le=10, description="0: always the most likely code")
    top_k: int | None = Field(None, ge=1, description="keep the k most likely codes")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the most likely codes that hold this probability")
    min_p: float | None = Field(
        None, ge=0, le=1, description="keep codes of at least this share of the most likely one's probability"
    )
    guidance: float = Field(
        1.0,
        ge=0,
        le=100,
        description="classifier-free guidance scale; 1: off; any other one needs caption dropout",
    )
    guidance_schedule: Literal["constant", "linear", "cosine", "power"] = Field(
        "constant", description="how the scale gets from 1 at each level's first code to `guidance` at its last one"
    )
    guidance_power: float = Field(2.0, gt=0, le=10, description="schedule power only: its exponent")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="the part of each level that is guided; outside of it the scale is 1"
    )
    passes: int | None = added(
        None, ge=1, description="order any: passes of the transformer per image; None: one for each code"
    )
    schedule: Literal["cosine", "linear"] = added(
        "cosine", description="order any: codes of each pass; cosine: few at first, linear: as many in each"
    )
    pass_order: Literal["random", "halton", "confidence"] = added(
        "random", description="order any: which codes come next; halton: spread out, confidence: the surest ones"
    )
    temperature_end: float | None = added(
        None,
        ge=0,
        le=10,
        description="orders any and scale: temperature of the last pass (order any: of each level), from `temperature`"
        " at the first; null: `temperature` in all",
    )
    speculate: int | None = added(
        None,
        ge=2,
        le=64,
        description="order raster, one image at a time: codes that a pass draws, of which the right ones stay; the same"
        " codes in fewer passes, in bf16 but for rounding; null: one by one",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision of the transformer while it generates; auto: bf16 on GPUs that compute in it, else fp32",
    )

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        begin, end = self.guidance_interval
        if not 0 <= begin < end <= 1:
            raise ValueError(f"guidance_interval must be two rising numbers from 0 to 1, found {begin} and {end}")
        return self

    def not_followed_by(self, order: str) -> str | None:
        """What is wrong with the first setting, given as other than its default, that models of `order` do not follow;
        None: they follow all."""
        for name, orders in _FOLLOWED_BY.items():
            if order not in orders and getattr(self, name) != type(self).model_fields[name].default:
                instead = "set passes instead" if (name, order) == ("speculate", "any") else "leave it out"
                return f"{name}: expected transformer.order {' or '.join(orders)}, found {order}: {instead}"
        return None

    def in_pass(self, index: int, count: int) -> SamplingConfig:
        """What pass `index` of `count` is drawn with: `temperature` at the first one, `temperature_end` at the last."""
        if self.temperature_end is None:
            return self
        part = index / max(count - 1, 1)
        temperature = self.temperature + part * (self.temperature_end - self.temperature)
        return self.model_copy(update={"temperature": temperature})

    def guidance_at(self, progress: float) -> float:
        """The guidance scale when `progress` (0 to 1) of a level's codes are drawn.

        Schedules: linear after Chang et al. 2023 (Muse, section 2.7); cosine, (1 - cos(pi progress)) / 2, after Gao et
        al. 2023 (MDT, section 3.3, whose power of the progress is 1 here); power, progress ** `guidance_power`, of no
        paper. An interval after Kynkäänniemi et al. 2024.
        """
        begin, end = self.guidance_interval
        if not begin <= progress <= end:
            return 1.0
        ramp: dict[str, float] = {
            "constant": 1.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "power": progress**self.guidance_power,
        }
        return 1 + (self.guidance - 1) * ramp[self.guidance_schedule]


class GenerateConfig(Config):
    """Section `generate`: the prompts that people look at, and the captions whose images are evaluated."""

    training_prompts: list[str] = Field(default_factory=list, description="captions that are in the train split")
    new_prompts: list[str] = Field(default_factory=list, description="captions that are not in the train split")
    samples: int = Field(512, ge=0, description="images for evaluate, captions drawn from the train split")
    shard_size: int = Field(128, ge=1, description="images per tar shard; a restart resumes at the next shard")
    candidates: int = Field(1, ge=1, description="images drawn per prompt; the reranker keeps the best")
    batch_size: int = operational(64, ge=1, description="images drawn at once; never changes them")
    compile: bool = operational(
        False, description="torch.compile the decode step: docs/sampling.md says when that pays"
    )
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> GenerateConfig:
        prompts = self.training_prompts + self.new_prompts
        if any(not prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty; write what the image should show")
        twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' is listed twice; keep it once")
        return self
