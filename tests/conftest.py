"""One finished run of the whole tiny pipeline, made once by the real command line and shared by many tests.

Slow tests are those that use this run, and those that are marked so since they take over 3 s. `make test-fast` runs the
others.
"""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `smalti run tests/configs/tiny.yaml`. Look, do not write."""
    # One for all of pytest-xdist's workers: their temporary folders are beside each other.
    folder = tmp_path_factory.getbasetemp() / "runs"
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = tmp_path_factory.getbasetemp().parent / "runs"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            launch("pipeline", "run", str(TINY), cwd=folder)  # below the current directory, as for most users
            (folder / "made").touch()
    return folder / "runs" / "tiny"
