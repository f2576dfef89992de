"""Section `image_tokenizer` of the pipeline config: which tokenizer, its loss, its training.

The defaults of `DVAEConfig` are those of Ramesh et al. 2021; the files in `configs/` choose smaller ones.
Knows no torch, so that the command line and the Slurm layer can read configs in milliseconds.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.train_config import TrainingConfig


class CosineRamp(Config):
    """A value that moves from `start` to `end` along half a cosine over the first `steps` steps, then stays.

    With `steps: 0` it is `end` from the beginning.
    """

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    steps: int = Field(ge=0, description="optimizer steps that the way from start to end takes")

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class DVAEConfig(Config):
    """The discrete VAE of Ramesh et al. 2021 (section 2.1, appendix A): architecture and loss.

    The picture is downsampled by `patch_size * 2 ** (len(widths) - 1)` on each side.
    """

    kind: Literal["dvae"] = "dvae"

    codebook_size: int = Field(8192, ge=2, le=2**20, description="K, the number of codes")
    code_width: int = Field(128, ge=1, description="channels of a code's vector, the decoder's input")
    patch_size: int = Field(1, ge=1, description="pixels of a patch's side that become one position before any layer")
    widths: tuple[int, ...] = Field(
        (256, 512, 1024, 2048), min_length=1, description="channels a resolution, fine to coarse; each next one halves"
    )
    blocks: int = Field(2, ge=1, description="residual blocks a resolution, in encoder and decoder alike")
    block_kernels: tuple[int, ...] = Field((3, 3, 3, 1), min_length=1, description="convolutions of a residual block")
    bottleneck: int = Field(4, ge=1, description="a block's inner width is its width divided by this")
    stem_kernel: int = Field(7, ge=1, description="kernel of the encoder's first convolution")

    logits: Literal["linear", "distance"] = Field("linear", description="distance: near vectors of the codebook score")
    reconstruction: Literal["logit_laplace", "l1", "l2"] = "logit_laplace"
    kl_weight: CosineRamp = CosineRamp(start=0.0, end=6.6, steps=5_000)
    usage_weight: CosineRamp = CosineRamp(start=0.0, end=0.0, steps=0)
    temperature: CosineRamp = CosineRamp(start=1.0, end=1 / 16, steps=150_000)
    straight_through: bool = Field(False, description="the decoder sees the sampled one-hot code; gradients stay soft")

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return self.patch_size * 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _check(self) -> DVAEConfig:
        if min(self.widths) < 1 or any(width % self.bottleneck for width in self.widths):
            raise ValueError(f"widths {list(self.widths)} must be positive multiples of bottleneck ({self.bottleneck})")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in (*self.block_kernels, self.stem_kernel)):
            raise ValueError("block_kernels and stem_kernel must be odd, so that a layer keeps the picture's size")
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise ValueError("temperature must stay above 0; an end of 1/16 is the paper's")
        return self


class ImageTokenizerConfig(Config):
    """What the image-tokenizer stage trains."""

    model: DVAEConfig = DVAEConfig()
    training: TrainingConfig
