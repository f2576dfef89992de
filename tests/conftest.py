"""One finished run of the whole tiny pipeline, made once by the real command line and shared by many tests.

Slow tests are those that use this run, and those that are marked so since they take over a second. `make test-fast`
runs the others.

With SMALTI_NO_SKIPS=1 a test that is skipped because a package is missing fails the whole, and is named at the end: all
but those marked `gpu` (or in tests/gpu) or `machine`.
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


_left_out: dict[str, str] = {}  # test: why it was skipped, which it may not be


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and not {"gpu", "machine"} & set(report.keywords):
        _note_skipped(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _note_skipped(report)


def _note_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    _left_out[report.nodeid] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


# First: the summary tells of the status. Of pytest-xdist's processes the controller has all reports, and the last word.
@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _no_skips() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _no_skips():
        terminalreporter.section("skipped, which SMALTI_NO_SKIPS forbids", red=True)
        for test, why in sorted(_left_out.items()):
            terminalreporter.line(f"{test}: {why}")


def _no_skips() -> bool:
    """Whether a test was skipped that may not be."""
    return os.environ.get("SMALTI_NO_SKIPS") == "1" and bool(_left_out)


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
