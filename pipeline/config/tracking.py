"""Section `tracking`: where MLflow keeps the runs."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.base import Config


class TrackingConfig(Config):
    """Section `tracking`: where MLflow keeps the runs."""

    enabled: bool = True
    uri: str | None = Field(
        None, description="MLflow server or database; default: sqlite, mlflow.db in the run directory"
    )
    experiment: str = "smalti"
    system_metrics_every_s: float = Field(5.0, gt=0)
    flush_timeout_s: float = Field(15.0, gt=0, description="how long a stage's end waits for a slow server")
