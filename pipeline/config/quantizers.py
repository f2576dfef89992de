"""Configs of the quantizers: a class for each file in pipeline/image_tokenizer/quantizers/. Knows no torch.

To add one: its config class here, with its `kind`, in the union `QuantizerConfig` below; quantizers/__init__.py has the
other steps.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config, added
from pipeline.config.schedules import CosineRamp


class CodebookConfig(Config):
    """Nearest neighbour in a codebook (van den Oord et al. 2017), learned by moving averages or by gradient.

    `normalize` with a small `code_width` is the factorised, l2-normalised codebook of Yu et al. 2022 (ViT-VQGAN).
    `depth` above 1 is residual VQ (Lee et al. 2022): each further codebook quantizes what the ones before left over,
    and each is a level of its own.
    """

    kind: Literal["ema", "gradient"]
    codebook_size: int = Field(8192, ge=2, le=2**20, description="K, the number of codes")
    code_width: int = Field(32, ge=1, description="channels of a code's vector")
    depth: int = Field(1, ge=1, le=16, description="codebooks one after the other, each on what is left (residual VQ)")
    normalize: bool = Field(False, description="vectors and codes on the unit sphere")
    commitment_weight: float = Field(0.25, ge=0, description="β, pulls the encoder's vectors to their codes")
    codebook_weight: float = Field(1.0, ge=0, description="gradient only: pulls codes to the encoder's vectors")
    decay: float = Field(0.99, ge=0, lt=1, description="of the moving averages, per step")
    dead_code_threshold: float = Field(
        0.1, ge=0, le=1, description="a code used less than this part of an even share moves to a vector of the batch"
    )
    kmeans_iterations: int = Field(10, ge=0, description="of the start from the first batch's vectors; 0: random codes")
    gradient: Literal["straight_through", "rotation"] = Field(
        "straight_through", description="rotation: the encoder's gradient is turned along (Fifty et al. 2024)"
    )

    @model_validator(mode="after")
    def _check(self) -> CodebookConfig:
        if self.normalize and self.depth > 1:
            raise ValueError("normalize needs depth 1: what a codebook leaves over is not on the unit sphere")
        return self


class MultiscaleConfig(Config):
    """One codebook on grids from coarse to fine, each on what the ones before left (Tian et al. 2024, section 3.2).

    Each grid is a level of its own. Grids of one size and no convolutions: Lee et al. 2022, with one codebook.
    """

    kind: Literal["multiscale"]
    scales: tuple[int, ...] = Field(
        (1, 2, 3, 4, 6, 8),
        min_length=1,
        max_length=32,
        description="positions on a side of each grid, coarse to fine; the last is the encoder's:"
        " image size / (patch_size · 2 ** (resolutions - 1))",
    )
    convolutions: int = Field(
        4, ge=0, description="φ, between a grid and the sum; neighbouring grids share one. 0: none"
    )
    codebook: CodebookConfig = Field(
        CodebookConfig(kind="ema"), description="the one codebook; `codebook_weight` is for the convolutions too"
    )
    codebook_per_scale: bool = added(
        False, description="a codebook for each grid, all as large as `codebook`: coarse grids use more of their codes"
    )

    @model_validator(mode="after")
    def _check(self) -> MultiscaleConfig:
        if min(self.scales) < 1 or list(self.scales) != sorted(self.scales):
            raise ValueError(
                f"scales must be 1 or more, and none smaller than the one before; found {list(self.scales)}"
            )
        taken = {"depth": self.codebook.depth > 1, "normalize": self.codebook.normalize}
        taken["gradient"] = self.codebook.gradient != "straight_through"
        if names := [name for name, is_set in taken.items() if is_set]:
            raise ValueError(f"codebook.{names[0]} is not for multiscale: leave it out")
        return self


class FSQConfig(Config):
    """Finite scalar quantization (Mentzer et al. 2023): every channel is rounded to one of a few values."""

    kind: Literal["fsq"]
    channels: tuple[int, ...] = Field(
        (8, 8, 8, 5, 5), min_length=1, description="values per channel; K is their product"
    )

    @property
    def codebook_size(self) -> int:
        return math.prod(self.channels)

    @model_validator(mode="after")
    def _check(self) -> FSQConfig:
        if min(self.channels) < 3 or self.codebook_size > 2**20:
            raise ValueError("channels must be at least 3 each, and their product at most 2**20")
        return self


class LFQConfig(Config):
    """Lookup-free quantization: every channel is its sign (Yu et al. 2023), and codes are kept in use by an entropy.

    `spherical` is binary spherical quantization (Zhao et al. 2024): vectors and codes on the unit sphere.
    """

    kind: Literal["lfq"]
    bits: int = Field(13, ge=1, le=20, description="K is 2 ** bits")
    spherical: bool = Field(False, description="vectors and codes on the unit sphere (BSQ)")
    commitment_weight: float = Field(0.25, ge=0, description="β, pulls the encoder's vectors to their codes")
    entropy_weight: float = Field(
        0.1, ge=0, description="of: entropy per position − diversity · entropy of the batch's mean"
    )
    diversity: float = Field(1.0, ge=0, description="weight of the batch's entropy beside the positions'")
    entropy_temperature: float = Field(
        1.0,
        gt=0,
        description="of the soft assignment that the entropies are of; where it is not given, 1 / bits with spherical",
    )

    @property
    def codebook_size(self) -> int:
        return 1 << self.bits

    @model_validator(mode="after")
    def _temperature_of_the_sphere(self) -> LFQConfig:
        # There a code's channel is ±1/√bits: at 1 / bits it is as sure, sigmoid(±4), as one of ±1 is at 1.
        if self.spherical and "entropy_temperature" not in self.model_fields_set:
            object.__setattr__(self, "entropy_temperature", 1 / self.bits)
        return self


class GumbelSettings(Config):
    """The Gumbel-softmax relaxation and its weights; the defaults are those of Ramesh et al. 2021 (appendix A)."""

    codebook_size: int = Field(8192, ge=2, le=2**20, description="K, the number of codes")
    code_width: int = Field(128, ge=1, description="channels of a code's vector, the decoder's input")
    logits: Literal["linear", "distance"] = Field("linear", description="distance: near vectors of the codebook score")
    kl_weight: CosineRamp = Field(
        CosineRamp(start=0.0, end=6.6, steps=5_000), description="β, of the KL divergence to the uniform prior"
    )
    batch_entropy_weight: CosineRamp = Field(
        CosineRamp(start=0.0, end=0.0, steps=0), description="pulls the codes' mean frequencies in a batch to even use"
    )
    temperature: CosineRamp = Field(
        CosineRamp(start=1.0, end=1 / 16, steps=150_000), description="τ of the relaxation; must stay above 0"
    )
    straight_through: bool = Field(False, description="the decoder sees the sampled one-hot code; gradients stay soft")

    @model_validator(mode="after")
    def _check_temperature(self) -> GumbelSettings:
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise ValueError("temperature must stay above 0; an end of 1/16 is the paper's")
        return self


class GumbelConfig(GumbelSettings):
    """The relaxation of the discrete VAE as a quantizer among others; the defaults suit short trainings."""

    kind: Literal["gumbel"]
    code_width: int = Field(32, ge=1, description="channels of a code's vector, the decoder's input")
    logits: Literal["linear", "distance"] = Field(
        "distance", description="distance: near vectors of the codebook score"
    )
    kl_weight: CosineRamp = Field(
        CosineRamp(start=0.0, end=0.0, steps=0), description="β, of the KL divergence to the uniform prior"
    )
    batch_entropy_weight: CosineRamp = Field(
        CosineRamp(start=0.01, end=0.0, steps=2_250),
        description="pulls the codes' mean frequencies in a batch to even use",
    )
    temperature: CosineRamp = Field(
        CosineRamp(start=1.0, end=1 / 16, steps=2_250), description="τ of the relaxation; must stay above 0"
    )


QuantizerConfig = Annotated[
    CodebookConfig | MultiscaleConfig | FSQConfig | LFQConfig | GumbelConfig, Field(discriminator="kind")
]


def levels_of(quantizer: QuantizerConfig) -> int:
    """Grids of codes that a quantizer makes of one grid of features."""
    if isinstance(quantizer, MultiscaleConfig):
        return len(quantizer.scales)
    return quantizer.depth if isinstance(quantizer, CodebookConfig) else 1
