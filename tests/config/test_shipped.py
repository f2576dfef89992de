"""Every config that is shipped loads, and could start with eight processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.base import differences, identity
from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import check_before_start

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_under_its_name_and_could_start(path: Path) -> None:
    config = load_pipeline(path)
    assert config.name == path.stem
    check_before_start(config, lambda stage: 8)


def test_openmoji_full_is_the_demo_at_64_pixels_and_nothing_else() -> None:
    demo, full = (load_pipeline(CONFIGS[0].with_name(f"{name}.yaml")) for name in ("openmoji", "openmoji-full"))
    assert differences(identity(demo), identity(full)) == [
        "prepare.image_size: 32 -> 64",
        "report.title: OpenMoji at 32×32 -> OpenMoji at 64×64",
    ]
