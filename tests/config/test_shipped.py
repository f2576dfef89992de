"""Every config that is shipped loads, and could start with eight processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import check_before_start

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_under_its_name_and_could_start(path: Path) -> None:
    config = load_pipeline(path)
    assert config.name == path.stem
    check_before_start(config, lambda stage: 8)
