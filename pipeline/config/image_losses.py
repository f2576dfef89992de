"""Configs of the losses beside the pixels' (`perceptual.py`, `discriminator.py`). Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config
from pipeline.config.training import Decay


class PerceptualConfig(Config):
    """Section `perceptual`: a distance in the features of a frozen network beside the pixels' loss; perceptual.py."""

    weight: float = Field(gt=0, description="times the distance, added to the tokenizer's loss")
    backbone: Literal["efficientnet-lite0", "lpips", "transformers", "timm"] = Field(
        "efficientnet-lite0", description="network whose features are compared"
    )
    weights: str | None = Field(
        None,
        description="lpips: a folder, see docs/evaluation.md; transformers: a folder or a name in its cache;"
        " timm: name=FILE or a name in its cache; efficientnet-lite0: none, they come with a package",
    )
    resize: int | None = Field(
        None, ge=16, description="pixels of the shorter side that the network sees; None: as they are"
    )
    start_step: int = Field(0, ge=0, description="first step that it counts in")

    @model_validator(mode="after")
    def _check(self) -> PerceptualConfig:
        if self.backbone in ("transformers", "timm") and not self.weights:
            raise ValueError(f"backbone {self.backbone} needs weights: a folder, or a name in the library's cache")
        if self.backbone == "efficientnet-lite0" and self.weights:
            raise ValueError("backbone efficientnet-lite0 takes no weights: they come with a package")
        return self


class AdversarialConfig(Config):
    """Section `adversarial`: a PatchGAN discriminator (Isola et al. 2017; Esser et al. 2021); discriminator.py."""

    start_step: int = Field(ge=0, description="first step in which the discriminator learns")
    ramp_steps: int = Field(1_000, ge=1, description="steps from there until the adversarial loss has its full weight")
    weight: float = Field(0.5, gt=0, description="adaptive: gradient at the pixels, times the reconstruction's")
    weighting: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="adaptive: by the ratio of gradients (Esser et al. 2021); fixed: `weight` as it is"
    )
    guard: float | None = Field(
        0.25, gt=0, description="share that the squared error may rise by before the weight falls; None: no guard"
    )

    width: int = Field(64, ge=8, multiple_of=8, description="channels of the discriminator's first layer")
    layers: int = Field(3, ge=1, le=6, description="layers that halve; a patch has 16, 34, 70 pixels with 1, 2, 3")
    lecam_weight: float = Field(0.001, ge=0, description="of LeCam's regularisation (Tseng et al. 2021); 0: off")
    learning_rate_ratio: float = Field(1.0, gt=0, description="discriminator's learning rate / training.learning_rate")
    betas: tuple[Decay, Decay] = Field((0.5, 0.9), description="of the discriminator's AdamW")
