"""Stages at work keep the config that they began with: their next start, in a requeued job, say, reads it again."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.base import differences
from pipeline.config.pipeline import PipelineConfig, is_run_config, load_pipeline
from pipeline.core.lock import refuse_if_held
from pipeline.orchestration.graph import stage_identity, stages_of


def refuse_other_config(run: Path, config: PipelineConfig, wait_s: float = 0.0) -> None:
    """Call it before the run's config is written. Waits `wait_s` for a stage to end.

    Raises:
        UserError: a process writes a stage of `run` that `config` would make otherwise.
    """
    if not is_run_config(run / "config.yaml"):
        return
    known = load_pipeline(run / "config.yaml")
    for stage in stages_of(known):
        changes = differences(stage_identity(known, stage.name), stage_identity(config, stage.name))
        if changes:
            locks = sorted((run / "locks").glob(f"{stage.name}.*json"))  # its own, and those of an array's tasks
            refuse_if_held(locks, f"stage {stage.name}, with another config ({'; '.join(changes[:4])}),", wait_s)
