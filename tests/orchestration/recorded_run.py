"""A run without the work."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from tests.conftest import STAGE_NAMES, TINY


def recorded_run(folder: Path) -> RunDirectory:
    """A run in `folder` whose stages are finished, as far as their records say."""
    config = load_pipeline(TINY, [f"runs={folder}"])
    runs = RunDirectory(config.run_directory)
    runs.open(config, "tiny.yaml")
    for name in STAGE_NAMES:
        runs.begin(config, stage_named(name))
        output = runs.stage(name) / "output.txt"
        output.write_text(f"made by {name}")
        runs.finish(stage_named(name), {output: None})
    return runs
