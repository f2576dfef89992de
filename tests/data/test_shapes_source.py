"""The world of shapes through `prepare`: what comes out is what the judge finds right, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.prepare import PrepareConfig
from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_samples
from pipeline.shapes.judge import scores
from tests.data.sample_images import tree_bytes


def config(**changes: object) -> PrepareConfig:
    values = {
        "source": {"kind": "shapes", "samples": 120},
        "image_size": 64,
        "shard_size": 50,
        "validation_fraction": 0.2,
    }
    return PrepareConfig.model_validate(values | changes)


def test_prepared_scenes_show_their_captions_and_are_the_same_each_time(tmp_path: Path) -> None:
    prepare(tmp_path / "a", config(workers=1), seed=0)
    prepare(tmp_path / "b", config(workers=2), seed=0)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    samples = [sample for split in ("train", "val") for sample in read_samples(tmp_path / "a", split)]
    assert len(samples) == 120
    assert scores((sample.image, sample.caption) for sample in samples)["overall"] == 1.0


def test_an_image_size_at_which_shapes_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 48 or more for the source shapes, found 32"):
        prepare(tmp_path / "a", config(image_size=32), seed=0)
