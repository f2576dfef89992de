"""Section `tracking`: where MLflow keeps the runs."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.base import Config


class TrackingConfig(Config):
    """Section `tracking`: where MLflow keeps the runs."""

    enabled: bool = Field(True, description="copy metrics.jsonl to MLflow")
    uri: str | None = Field(
        None, description="MLflow server or database; default: sqlite, mlflow.db in the run directory"
    )
    experiment: str = Field("smalti", description="MLflow experiment that the runs belong to")
    system_metrics_every_s: float = Field(5.0, gt=0, description="seconds between measurements of CPU and memory")
    flush_timeout_s: float = Field(15.0, gt=0, description="seconds that the end of a stage waits for a slow server")
