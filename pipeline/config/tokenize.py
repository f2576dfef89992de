"""Config of the stage tokenize. Knows no torch."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.base import Config


class TokenizeConfig(Config):
    """Section `tokenize`: from image shards to token arrays."""

    crops: int = Field(1, ge=1, le=64, description="versions of a training image: the whole, then random crops of it")
    min_crop_scale: float = Field(0.8, gt=0, le=1, description="smallest side of a random crop / side of the image")
    batch_size: int = Field(64, ge=1, description="images the image tokenizer encodes at once")
