"""Section `tracking`: where MLflow keeps the runs."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import Field, field_validator

from pipeline.config.base import Config
from pipeline.core.credentials import CREDENTIALS_VARIABLE, take_password_out

log = logging.getLogger(__name__)


class TrackingConfig(Config):
    """Section `tracking`: where MLflow keeps the runs."""

    enabled: bool = Field(True, description="copy metrics.jsonl to MLflow")
    uri: str | None = Field(
        None, description="MLflow server or database; default: sqlite, mlflow.db in the run directory"
    )
    experiment: str = Field("smalti", min_length=1, description="MLflow experiment that the runs belong to")
    system_metrics_every_s: float = Field(5.0, gt=0, description="seconds between measurements of CPU, GPU and memory")
    flush_timeout_s: float = Field(15.0, gt=0, description="seconds that the end of a stage waits for a slow server")

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        """What is written down has no password; a database's relative path means the same from everywhere."""
        if uri is None:
            return None
        bare = take_password_out(uri)
        if bare != uri:
            log.warning(
                "tracking.uri: the password is kept out of what is written; for a command that starts from the run's"
                " config.yaml, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or %s to the whole address",
                CREDENTIALS_VARIABLE,
            )
        path = bare.removeprefix("sqlite:///")
        return f"sqlite:///{Path(path).absolute()}" if path != bare and path and ":memory:" not in path else bare
