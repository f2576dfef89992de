"""Tracking: metrics.jsonl is the truth, MLflow its mirror.

A stage appends every metric to its `metrics.jsonl`. A background thread copies what MLflow does not
have yet: on a resume it asks the server for the last step of each metric and continues after it, so
nothing is doubled, and a server that was away for a while catches up. A broken server gets one warning
and delays nothing. MLflow keeps a parent run for the pipeline and a child for each stage.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from pipeline.config.base import flatten
from pipeline.config.tracking import TrackingConfig
from pipeline.core.atomic_io import read_json, write_atomic, write_json
from pipeline.core.lock import Lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from PIL import Image

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "KILLED", "FAILED"]
_POLL_S = 2.0
_RETRY_S = 30.0


def default_uri(run_directory: Path) -> str:
    return f"sqlite:///{(run_directory / 'mlflow.db').absolute()}"


class Tracker:
    """The metrics, images and artifacts of a stage. On ranks other than 0 (`active=False`) methods do nothing."""

    def __init__(self, directory: Path, mirror: Mirror | None, *, every_s: float = 5.0, active: bool = True) -> None:
        self.directory = directory
        self.active = active
        self._mirror = mirror
        self._every_s = every_s
        self._system_logged = 0.0

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append a line to metrics.jsonl; every few seconds with system metrics."""
        if not self.active or not metrics:
            return
        line: dict[str, float] = {"step": step, "time": time.time()} | metrics
        if time.monotonic() - self._system_logged > self._every_s:
            line |= _system_metrics()
            self._system_logged = time.monotonic()
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Save an image of this step under images/ and as an artifact."""
        if not self.active:
            return
        path = self.directory / "images" / f"{name}-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self.artifact(path, folder="images")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if self.active and self._mirror:
            self._mirror.artifacts.append((path, folder))

    def truncate(self, step: int) -> None:
        """Remove the lines after `step`: a resumed training writes them again."""
        path = self.directory / "metrics.jsonl"
        if not self.active or not path.exists():
            return
        lines = path.read_text().splitlines()
        kept = [line for line in lines if _parsed(line).get("step", step + 1) <= step]
        if len(kept) < len(lines):
            write_atomic(path, "".join(line + "\n" for line in kept))

    def start(self) -> None:
        if self._mirror:
            self._mirror.start()

    def close(self, status: Status) -> None:
        if self._mirror:
            self._mirror.close(status)


def _system_metrics() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_used_bytes": memory.total - memory.available,
        "system/process_memory_bytes": psutil.Process().memory_info().rss,
    }


def _parsed(line: str) -> dict[str, float]:
    try:
        values: dict[str, float] = json.loads(line)
    except ValueError:  # the line that a killed process did not finish
        return {}
    return values


class Mirror:
    """The background thread that copies one stage's metrics and artifacts to MLflow."""

    def __init__(
        self,
        config: TrackingConfig,
        run_directory: Path,
        pipeline: str,
        stage: str,
        *,
        parameters: Mapping[str, object],
        last_stage: bool,
    ) -> None:
        self.config = config
        self.uri = config.uri or default_uri(run_directory)
        self.artifacts: list[tuple[Path, str | None]] = []
        self._run_directory = run_directory
        self._pipeline = pipeline
        self._stage = stage
        self._parameters = parameters
        self._last_stage = last_stage
        self._metrics_path = run_directory / stage / "metrics.jsonl"
        self._last_steps: dict[str, int] = {}
        self._offset = 0
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._parent_id = ""
        self._status: Status | None = None
        self._wake = threading.Event()
        self._warned = False
        self._done = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, status: Status) -> None:
        """Send what is left and end the MLflow run; waits at most `flush_timeout_s`."""
        self._status = status
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self.config.flush_timeout_s)
        if not self._done:
            self._warn(f"it did not take everything within {self.config.flush_timeout_s:.0f} s")

    def _work(self) -> None:
        while True:
            closing = self._wake.wait(_POLL_S)
            try:
                if self._client is None:
                    self._connect()
                self._copy()
                if self._status:
                    self._end_runs(self._status)
                    self._done = True
                    return
            except Exception as error:  # whatever a server does, the training continues
                self._warn(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                if closing or self._wake.wait(_RETRY_S):
                    return

    def _warn(self, problem: str) -> None:
        if not self._warned:
            log.warning(
                "MLflow at %s is not usable (%s): continuing without it; everything is in %s",
                self.uri,
                problem,
                self._metrics_path,
            )
        self._warned = True

    def _connect(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # _warn reports a failure, once
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for noisy in ("alembic", "mlflow", "sqlalchemy", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        # Stages that start at the same time share one parent: the first one creates it.
        with Lock(self._run_directory / "locks" / "mlflow.json", "the MLflow run", wait_s=60):
            self._parent_id = self._resume_or_create(client, self._run_directory, self._pipeline, None, {})
        self._run_id = self._resume_or_create(
            client, self._run_directory / self._stage, self._stage, self._parent_id, self._parameters
        )
        for metric in client.get_run(self._run_id).data.metrics:
            self._last_steps[metric] = max(m.step for m in client.get_metric_history(self._run_id, metric))
        self._client = client

    def _resume_or_create(
        self, client: MlflowClient, directory: Path, name: str, parent: str | None, parameters: Mapping[str, object]
    ) -> str:
        """The MLflow run whose id is in `directory`/mlflow.json; a new one if there is none."""
        from mlflow.entities import Param, RunStatus

        record = directory / "mlflow.json"
        if record.exists() and (known := read_json(record))["uri"] == self.uri:
            run_id: str = known["run_id"]
            client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            return run_id
        experiment = client.get_experiment_by_name(self.config.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(self.config.experiment, artifact_location=self._artifact_location())
        )
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        write_json(record, {"uri": self.uri, "run_id": run_id})
        listed = [Param(key, str(value)[:6000]) for key, value in flatten(parameters).items()]
        for start in range(0, len(listed), 100):
            client.log_batch(run_id, params=listed[start : start + 100])
        return run_id

    def _artifact_location(self) -> str | None:
        """Where artifacts go: into the run directory, unless there is a server, which decides for itself."""
        if self.uri.startswith("http"):
            return None
        return (self._run_directory / "mlartifacts").absolute().as_uri()

    def _copy(self) -> None:
        assert self._client is not None
        if self._metrics_path.exists():
            with open(self._metrics_path) as file:
                file.seek(self._offset)
                while (line := file.readline()).endswith("\n"):
                    if (values := _parsed(line)) and (fresh := self._fresh(values)):
                        self._client.log_batch(self._run_id, metrics=fresh)
                    self._offset = file.tell()
        while self.artifacts:
            path, folder = self.artifacts[0]
            if path.exists():
                self._client.log_artifact(self._run_id, str(path), artifact_path=folder)
            self.artifacts.pop(0)

    def _fresh(self, values: dict[str, float]) -> list[Metric]:
        """The metrics of a line that MLflow does not have yet."""
        from mlflow.entities import Metric

        step, at_ms = int(values.pop("step")), int(values.pop("time") * 1000)
        return [
            Metric(name, float(value), at_ms, step)
            for name, value in values.items()
            if step > self._last_steps.get(name, -1)
        ]

    def _end_runs(self, status: Status) -> None:
        assert self._client is not None
        self._client.set_terminated(self._run_id, status)
        if self._last_stage or status != "FINISHED":
            self._client.set_terminated(self._parent_id, status)
