"""A real, if small, tokenizer of two levels: mean brightness of 2x2 and 4x4 patches, in 16 and 70,000 steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.image_tokenizer.base import ImageTokenizer, Level

KIND = ("tests.data.two_levels", "TwoLevels")  # for pipeline.image_tokenizer.base.KINDS


class TwoLevelsConfig(Config):
    kind: str = "two-levels"


class TwoLevels(ImageTokenizer):
    config_class = TwoLevelsConfig

    def __init__(self, config: TwoLevelsConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.register_buffer("steps", torch.tensor([16, 70_000]))

    @property
    def levels(self) -> list[Level]:
        return [Level(2, 2, 16), Level(4, 4, 70_000)]

    def encode(self, images: Tensor) -> list[Tensor]:
        return encode(images)

    def decode(self, codes: list[Tensor]) -> Tensor:
        """Brightness of the coarse level in red, of the fine one in green."""
        images = torch.zeros(len(codes[0]), 3, self.image_size, self.image_size)
        for channel, (level, found) in enumerate(zip(self.levels, codes, strict=True)):
            grid = found.view(-1, 1, level.height, level.width) / (level.codebook_size - 1)
            images[:, channel] = F.interpolate(grid, size=self.image_size)[:, 0]
        return images

    def objective(self) -> nn.Module:
        raise NotImplementedError


def encode(images: Tensor) -> list[Tensor]:
    grey = images.mean(dim=1, keepdim=True)
    coarse, fine = (F.adaptive_avg_pool2d(grey, side).flatten(1) for side in (2, 4))
    return [(coarse * 15.99).long(), (fine * 69_999).long()]
