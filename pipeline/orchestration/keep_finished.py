"""With `--amend`, trainings that are finished stay so, though the weights of prepare.sources changed: on record."""

from __future__ import annotations

from pipeline.config.pipeline import PipelineConfig
from pipeline.orchestration.going_on import stays_finished
from pipeline.orchestration.graph import stages_of
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.start_model import made_from


def keep_finished(runs: RunDirectory, config: PipelineConfig) -> None:
    """Record the weights that changed since in each finished training, which then is up to date."""
    for stage in stages_of(config):
        manifest = runs.manifest(stage.name)
        if stage.trains and manifest is not None:
            wanted = made_from(config, stage, runs.stage(stage.name))
            if stays_finished(manifest["config"], wanted):
                runs.go_on(config, stage, amend=True)
