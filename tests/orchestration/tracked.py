"""Stages without the work, whose metrics and artifacts a tracker mirrors to MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.config.base import to_yaml
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.config.tracking import TrackingConfig
from pipeline.core.atomic_io import write_atomic, write_json
from pipeline.orchestration.graph import stage_identity
from pipeline.orchestration.mlflow_mirror import Mirror
from pipeline.orchestration.mlflow_store import default_uri
from pipeline.orchestration.tracking import Tracker
from tests.conftest import TINY


def config_of(run: Path, **tracking: object) -> PipelineConfig:
    config = load_pipeline(TINY, [f"runs={run.parent}", f"name={run.name}"])
    return config.model_copy(update={"tracking": TrackingConfig.model_validate(tracking)})


def start_tracker(run: Path, *, stage: str = "transformer", uri: str | None = None, flush_s: float = 30.0) -> Tracker:
    config = config_of(run, uri=uri, flush_timeout_s=flush_s)
    directory = run / stage
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", to_yaml(config))
    if not (directory / "identity.json").exists():
        write_json(directory / "identity.json", {"config": stage_identity(config, stage), "inputs": {}})
    tracker = Tracker(directory, Mirror(config, stage))
    tracker.start()
    return tracker


def history(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, metric)]


def record_of(directory: Path) -> dict[str, Any]:
    """Its mlflow.json."""
    return dict(json.loads((directory / "mlflow.json").read_text()))


def client_of(run: Path) -> MlflowClient:
    return MlflowClient(default_uri(run))
