"""Section `evaluate`. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Config, added, operational

EXTRACTORS = ("efficientnet-lite0", "inception-v3", "clip", "dinov2")


class SweepConfig(Config):
    """Settings of sampling that are tried: every combination of the three lists."""

    guidance: list[Annotated[float, Field(ge=0, le=100)]] = Field(
        [1.0], min_length=1, description="classifier-free guidance scales"
    )
    temperature: list[Annotated[float, Field(ge=0, le=10)]] = Field(
        [1.0], min_length=1, description="temperatures; 0: always the most likely code"
    )
    top_k: list[Annotated[int, Field(ge=1)] | None] = Field([None], min_length=1, description="null: all codes")
    samples: int = Field(256, ge=2, description="images per setting")

    @field_validator("guidance", "temperature", "top_k")
    @classmethod
    def _each_once(cls, values: list[float | int | None]) -> list[float | int | None]:
        if len(set(values)) < len(values):
            raise ValueError("a value is listed twice; keep it once")
        return values


class EvaluateConfig(Config):
    """What is measured, on how many images. All set metrics compare equal numbers of images."""

    extractor: str = Field(
        "efficientnet-lite0", description=f"network whose features the distances are taken in: {', '.join(EXTRACTORS)}"
    )
    weights: str | None = Field(
        None, description="inception-v3: its weights file; clip, dinov2: the folder that transformers saved, or a name"
    )
    clip: str | None = Field(None, description="folder or name of a CLIP model that scores images by their captions")
    lpips: Path | None = Field(None, description="folder with vgg16-397923af.pth and LPIPS's vgg.pth")
    sweep: SweepConfig | None = Field(None, description="settings of sampling to try; the best one is written down")
    samples: int | None = Field(None, ge=2, description="images per set; None: all that `generate` made")
    training_images: int = Field(
        20_000, ge=2, description="at most so many, drawn from all, are searched for the nearest one"
    )
    reconstructions: int = Field(
        250, ge=2, description="images of each split that the tokenizer reconstructs, at most, drawn from all"
    )
    reconstructions_shown: int = Field(12, ge=0, description="of the validation images, drawn from all, for the report")
    samples_shown: int = Field(18, ge=0, description="of the generated images, drawn at random, for the report")
    perturbations: list[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[int, Field(ge=1)]]] = added(
        [],
        description="pFID of the image tokenizer: pairs of a share of codes that are replaced and of how many nearest "
        "codes, e.g. [0.5, 100]; it needs quantizers other than multiscale",
    )
    inception_splits: int = Field(10, ge=1, description="parts of the Inception Score, for its spread")
    judged_prompts: int = added(
        40,
        ge=0,
        description="source shapes: prompts of each task, of seen and of held-out combinations, whose images the judge "
        "looks at; 0: none",
    )
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage")
    kid_subsets: int = Field(50, ge=1, description="random subsets that the kernel distance is averaged over")
    kid_subset_size: int = Field(1000, ge=2, description="at most half of the samples are used for one subset")
    bootstraps: int = Field(20, ge=0, description="resamples for the interval of the Fréchet distance; 0: none")
    batch_size: int = operational(64, ge=1, description="images per pass through the extractor")
    feature_cache: Path | None = operational(
        None, description="folder of features by content hash, shared by runs; None: .cache/features beside the runs"
    )
    feature_cache_gb: float = operational(20.0, ge=0, description="above it, what was not used for longest is removed")

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"extractor: expected one of {', '.join(EXTRACTORS)}, found '{self.extractor}'")
        if self.extractor in ("clip", "dinov2") and not self.weights:
            raise ValueError(f"extractor {self.extractor} needs evaluate.weights, a folder that transformers saved")
        if self.extractor == "efficientnet-lite0" and self.weights:
            raise ValueError("extractor efficientnet-lite0 brings its own weights; remove evaluate.weights")
        return self
