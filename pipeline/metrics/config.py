"""Section `evaluate`. Knows no torch."""

from __future__ import annotations

from pydantic import Field

from pipeline.config import Config, operational


class EvaluateConfig(Config):
    """What is measured, on how many pictures. All set figures compare equal numbers of pictures."""

    extractor: str = Field("efficientnet-lite0", description="network whose features the distances are taken in")
    samples: int | None = Field(None, ge=2, description="pictures a set; None: all that `generate` made")
    training_pictures: int = Field(20_000, ge=2, description="at most so many are searched for the nearest one")
    reconstructions: int = Field(
        250, ge=2, description="pictures of each split that the tokenizer reconstructs, at most"
    )
    reconstructions_shown: int = Field(12, ge=0, description="of the validation pictures, for the report")
    inception_splits: int = Field(10, ge=1, description="parts of the Inception Score, for its spread")
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage")
    kid_subsets: int = Field(50, ge=1)
    kid_subset_size: int = Field(1000, ge=2, description="at most half of the samples are used for one subset")
    batch_size: int = operational(64, ge=1, description="pictures a pass through the extractor")
