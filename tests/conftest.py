"""One finished run of the whole tiny pipeline, made once by the real command line and shared by many tests.

Slow tests are those that use this run, and those that are marked so since they take over a second. `make test-fast`
runs the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stages_of
from tests.launch import ROOT, launch

TINY = ROOT / "tests" / "configs" / "tiny.yaml"
NO_TRACKING = "tracking.enabled=false"  # MLflow takes two seconds of each stage, and has tests of its own
STAGE_NAMES = tuple(stage.name for stage in stages_of(load_pipeline(TINY)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "tiny_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest-xdist's workers fills, and all look at; do not write there."""
    base = tmp_path_factory.getbasetemp()
    # Their temporary folders are beside each other.
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `smalti run tests/configs/tiny.yaml`. Look, do not write."""

    def make(folder: Path) -> None:
        launch("pipeline", "run", str(TINY), cwd=folder)  # below the current directory, as for most users

    return made_once(tmp_path_factory, "runs", make) / "runs" / "tiny"
