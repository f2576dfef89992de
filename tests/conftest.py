"""One finished run of the whole tiny pipeline, made once by the real command line and shared by many tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stages_of
from tests.launch import ROOT, launch

TINY = ROOT / "tests" / "configs" / "tiny.yaml"
STAGE_NAMES = tuple(stage.name for stage in stages_of(load_pipeline(TINY)))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `smalti run tests/configs/tiny.yaml`. Look, do not write."""
    folder = tmp_path_factory.mktemp("runs")
    launch("pipeline", "run", str(TINY), cwd=folder)  # below the current directory, as for most users
    return folder / "runs" / "tiny"
