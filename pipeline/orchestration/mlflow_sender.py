"""What one stage directory sends to its MLflow run, from where the last process that sent left off."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.config.base import flatten
from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.core.urls import mask, mask_all
from pipeline.orchestration.going_on import amendments_of
from pipeline.orchestration.mlflow_store import Store, legal_name
from pipeline.orchestration.tracking import EVENTS, METRICS, Status, metrics_of, parsed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

RECORD = "mlflow.json"
_BATCH = 500
_FILE_REFUSALS = (400, 413, 414, 415, 422)  # of HTTP: a name or a size that is not taken
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED")
T = TypeVar("T")


class ParentRun(Protocol):
    """The pipeline's run."""

    @property
    def run_id(self) -> str:
        """Its id."""

    @property
    def experiment_id(self) -> str:
        """The id of the experiment that it belongs to."""

    def holds(self, stage: str) -> bool:
        """Whether the stage's directory is of its config."""


class Sender:
    """Copies a stage directory's files to MLflow. `record` is its mlflow.json."""

    def __init__(self, client: MlflowClient, store: Store, parent: ParentRun, stage: str) -> None:
        self.directory = store.run_directory / stage
        self._client = client
        self._store = store
        self._position = (0, 0)  # inode of metrics.jsonl, and the byte that is read next
        self._sent: dict[str, dict[int, tuple[int, float]]] = {}  # metric -> step -> time in ms and value, the latest
        self.record = known_run(client, store, self.directory)
        if not self.record:
            tags = {"mlflow.parentRunId": parent.run_id}
            run = client.create_run(parent.experiment_id, run_name=stage, tags=tags)
            self.record = new_record(store, run.info.run_id) | {"artifacts": 0}
            self._save()
        elif parent.holds(stage):  # else it stays below the run of the config that made it
            client.set_tag(self.run_id, "mlflow.parentRunId", parent.run_id)
        client.update_run(self.run_id, status="RUNNING")
        self.record["status"] = "RUNNING"
        self._save()
        send_parameters(client, self.run_id, _parameters(self.directory))
        for metric in client.get_run(self.run_id).data.metrics:
            self._note(client.get_metric_history(self.run_id, metric))

    @property
    def run_id(self) -> str:
        """The id of the stage's MLflow run."""
        return str(self.record["run_id"])

    def send(self) -> None:
        """Send the metrics and artifacts that MLflow does not have yet."""
        self._send_metrics()
        events = _events(self.directory)
        artifacts = [event for event in events if "artifact" in event]
        for event in artifacts[int(self.record.get("artifacts", 0)) :]:
            path = self.directory / str(event["artifact"])
            if path.exists():
                self._send_artifact(path, event.get("folder"))
            self.record["artifacts"] = int(self.record.get("artifacts", 0)) + 1
            self._save()

    def _send_artifact(self, path: Path, folder: str | None) -> None:
        try:
            self._client.log_artifact(self.run_id, str(path), artifact_path=folder)
        except Exception as error:
            if not _refuses_file(error) or not is_active(self._client, self.run_id):
                raise
            log.warning("MLflow refuses %s (%s): it is there alone", path, reason_of(error))

    def end(self, status: Status) -> None:
        """End the MLflow run."""
        self._client.set_terminated(self.run_id, status)
        path = self.directory / METRICS
        self.record |= {"status": status, "metrics_bytes": path.stat().st_size if path.exists() else 0}
        self._save()

    def finish(self, status: Status) -> None:
        """Send all of a stage on which nobody works, and end its MLflow run."""
        try:
            self.send()
        finally:  # whatever is missing, it does not run
            self._client.set_terminated(self.run_id, status)
        self.end(status)

    def _save(self) -> None:
        write_json(self.directory / RECORD, self.record)

    def _send_metrics(self) -> None:
        path = self.directory / METRICS
        if not path.exists():
            return
        fresh: list[Metric] = []
        with open(path, "rb") as file:
            inode, offset = self._position
            # A resumed training writes the file anew, without the steps that it repeats.
            file.seek(offset if inode == path.stat().st_ino and offset <= path.stat().st_size else 0)
            position = file.tell()
            while (line := file.readline()).endswith(b"\n"):
                fresh += self._fresh(line.decode(errors="replace"))
                position = file.tell()
                if len(fresh) >= _BATCH:
                    self._log(fresh)
                    fresh = []
        self._log(fresh)
        self._position = (path.stat().st_ino, position)

    def _log(self, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _BATCH):
            batch = metrics[start : start + _BATCH]
            _each_if_refused(
                self._client,
                self.run_id,
                batch,
                lambda part: self._client.log_batch(self.run_id, metrics=part),
                lambda metric: metric.key,
            )
            self._note(batch)

    def _note(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            steps = self._sent.setdefault(metric.key, {})
            steps[metric.step] = max((metric.timestamp, metric.value), steps.get(metric.step, (-1, 0.0)))

    def _fresh(self, line: str) -> list[Metric]:
        """The metrics of a line that MLflow does not have yet."""
        from mlflow.entities import Metric

        found = metrics_of(line)
        if found is None:
            return []
        step, at, values = found
        at_ms = int(at * 1000)
        named = [(name, legal_name(name), value) for name, value in values.items()]
        return [
            Metric(legal, value, at_ms, step)
            for name, legal, value in named
            if _is_news(name, at_ms, value, self._sent.get(legal, {}).get(step))
        ]

    @staticmethod
    def is_complete(directory: Path, store: Store, run_directory: Path) -> bool:
        """Whether MLflow has all of this stage. Asks the files alone."""
        try:
            record = read_json(directory / RECORD)
        except (OSError, UserError):
            return False
        if not isinstance(record, dict) or record.get("uri") != (None if store.own else mask(store.uri)):
            return False
        if not store.own and record.get("directory") != str(run_directory.absolute()):
            return False
        path = directory / METRICS
        return (
            record.get("status") not in (None, "RUNNING")
            and record.get("metrics_bytes") == (path.stat().st_size if path.exists() else 0)
            and record.get("artifacts") == sum("artifact" in event for event in _events(directory))
        )

    @staticmethod
    def is_left(directory: Path) -> bool:
        """Whether the stage's last process sends nothing itself."""
        started = [event for event in _events(directory) if "started" in event]
        return bool(started) and started[-1].get("mirrored") is False

    @staticmethod
    def recorded_end(directory: Path) -> Status | None:
        """How the stage's last process said that it ended; None if it was killed before."""
        ended = next((e.get("ended") for e in reversed(_events(directory)) if "ended" in e or "started" in e), None)
        return ended if ended in ("FINISHED", "KILLED", "FAILED") else None


def _is_news(name: str, at_ms: int, value: float, sent: tuple[int, float] | None) -> bool:
    """Whether a point is one that MLflow lacks, given the latest that it has of this metric and step.

    A stage that repeats a step may come to another value, which then holds: amended, or with other data.
    """
    if sent is None:
        return True
    if at_ms <= sent[0] or name in CLOCK_METRICS or name.startswith("system/"):
        return False
    # Databases have no infinity: MLflow takes the largest number for it.
    old, new = (max(-sys.float_info.max, min(sys.float_info.max, number)) for number in (sent[1], value))
    return not (math.isclose(old, new, rel_tol=1e-9) or (math.isnan(sent[1]) and math.isnan(value)))


def known_run(client: MlflowClient, store: Store, directory: Path) -> dict[str, Any]:
    """The record of the MLflow run that `directory` had; empty if it needs a new one.

    A copy of a run directory is a run of its own; one that was moved stays the run that it was.
    """
    try:
        record = read_json(directory / RECORD)
        run_id, uri = str(record["run_id"]), record.get("uri")
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return {}
    # Versions before wrote the own database's full address.
    own = uri is None or (str(uri).startswith("sqlite:////") and str(uri).endswith("/mlflow.db"))
    if own != store.own or (not own and uri != mask(store.uri)):
        return {}
    if not own and _is_copied(record, directory, store):
        return {}
    return dict(record) | new_record(store, run_id) if is_active(client, run_id) else {}


def is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether MLflow has this run, and nobody has deleted it there."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def new_record(store: Store, run_id: str) -> dict[str, Any]:
    """What every mlflow.json has: which store, which run in it, and where the run directory was then."""
    uri = None if store.own else mask(store.uri)
    return {"uri": uri, "run_id": run_id, "directory": str(store.run_directory.absolute())}


def _is_copied(record: dict[str, Any], directory: Path, store: Store) -> bool:
    before = record.get("directory")
    if before is None or before == str(store.run_directory.absolute()):
        return False
    original = Path(before) / directory.relative_to(store.run_directory) / RECORD
    try:
        return bool(read_json(original)["run_id"] == record["run_id"])
    except (OSError, UserError, KeyError, TypeError):
        return False


def send_parameters(client: MlflowClient, run_id: str, parameters: object) -> None:
    """Send nested values as parameters that MLflow does not have yet. It lets none be changed."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    flat = {legal_name(key): str(value)[:6000] for key, value in flatten(mask_all(parameters)).items()}
    listed = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(listed), 100):
        part = listed[start : start + 100]
        _each_if_refused(client, run_id, part, lambda some: client.log_batch(run_id, params=some), lambda p: p.key)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answers, and does not take what it was sent."""
    return getattr(error, "error_code", None) in _REFUSALS


def _refuses_file(error: Exception) -> bool:
    """Whether MLflow, or a proxy before it, takes this file never: not where it asks for a password, or is busy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in _FILE_REFUSALS or getattr(error, "error_code", None) in _REFUSALS[:3]


def reason_of(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {mask((str(error).splitlines() or [''])[0])}"


def _each_if_refused(
    client: MlflowClient, run_id: str, items: Sequence[T], send: Callable[[list[T]], object], name: Callable[[T], str]
) -> None:
    """Send a batch; if MLflow refuses it, one by one, and say which ones it does not take."""
    if not items:
        return
    try:
        send(list(items))
    except Exception as error:
        if not is_refusal(error) or not is_active(client, run_id):
            raise
        if len(items) == 1:
            log.warning("MLflow refuses %s (%s): it is in %s alone", name(items[0]), reason_of(error), METRICS)
            return
        for item in items:
            _each_if_refused(client, run_id, [item], send, name)


def _events(directory: Path) -> list[dict[str, Any]]:
    path = directory / EVENTS
    return [parsed(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parameters(directory: Path) -> object:
    """The config that decided the stage's result; MLflow keeps what a key began with, so changes have names apart."""
    try:
        changes = {
            f"amended.{at['step']}.{at['key']}": f"{at['old']} -> {at['new']}" for at in amendments_of(directory)
        }
        return dict(read_json(directory / "identity.json"))["config"] | changes
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return {}
