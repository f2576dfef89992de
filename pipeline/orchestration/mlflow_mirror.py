"""MLflow as the mirror of a run directory: a run for the pipeline, and below it one for each stage.

`mlflow.json` beside what was sent says how far that got, so a resume doubles nothing, and what is missing (the server
was away, a process was killed) is sent by the next stage that starts, or by `smalti ui`. A background thread does it
while a stage works; a broken server gets one warning and delays nothing.

A database file is written by one process at a time, since on a network file system its own locks may not hold: Slurm's
jobs leave it alone (`is_left_to_others`). The last stage of a run sends all of it, and `smalti ui` while they work.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.lock import Lock, owner_of
from pipeline.core.urls import mask
from pipeline.orchestration.environment import SUBMITTED_VARIABLE
from pipeline.orchestration.graph import stages_of
from pipeline.orchestration.mlflow_parent import Parent
from pipeline.orchestration.mlflow_sender import Sender, is_refusal, reason_of
from pipeline.orchestration.mlflow_store import Store, import_mlflow, sqlite_file
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.tracking import EVENTS, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_POLL_S = 2.0
_RETRY_S = 30.0
_LOCK_WAIT_S = 300.0
_WHOLE_RUN_S = 300.0


class Mirror:
    """The background thread that copies one stage's metrics and artifacts to MLflow, and first what others left."""

    def __init__(self, config: PipelineConfig, stage: str) -> None:
        self.config = config.tracking
        self.store = Store(config)
        self._pipeline = config
        self._stage = stage
        self._sender: Sender | None = None
        self._parent: Parent | None = None
        self._status: Status | None = None
        self._wake = threading.Event()
        self._warned = False
        self._done = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin to send. MLflow is imported before, in the caller's thread: see `import_mlflow`."""
        with suppress(Exception):  # the thread tells of it
            import_mlflow()
        self._thread.start()

    def close(self, status: Status) -> None:
        """Send what is left and end the MLflow run; waits at most `flush_timeout_s`, for a whole run longer."""
        patience_s = self.config.flush_timeout_s
        if _is_shared_file(self._pipeline):
            patience_s = max(patience_s, _WHOLE_RUN_S)
        self._status = status
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(patience_s)
        if not self._done:
            self._warn(f"it did not take everything within {patience_s:g} s")

    def _work(self) -> None:
        """The thread. In one of Slurm's jobs `smalti ui` may write the same database: they take turns by a lock."""
        while True:
            closing = self._wake.wait(_POLL_S)
            try:
                if self._sender is None:
                    self._connect()
                assert self._sender is not None
                assert self._parent is not None
                if self._status is None:
                    with self._turn():
                        self._sender.send()
                else:
                    with self._turn():
                        self._sender.finish(self._status)
                    with _lock(self._pipeline):
                        self._parent.update(_parent_status(self._pipeline, self._stage, self._status))
                    self._done = True
                    return
            except Exception as error:  # whatever a server does, the training continues
                self._warn(reason_of(error), refused=is_refusal(error))
                self._sender = None  # asks anew what MLflow has, also where its run was deleted there
                if closing or self._wake.wait(_RETRY_S):
                    return

    def _turn(self) -> AbstractContextManager[object]:
        return _lock(self._pipeline) if _is_shared_file(self._pipeline) else nullcontext()

    def _connect(self) -> None:
        # Stages that start at the same time share one parent, and one of them sends what is missing.
        with _lock(self._pipeline):
            client = self.store.connect()
            self._parent = Parent(client, self.store, self._pipeline)
            self._parent.update("RUNNING")
            sender = Sender(client, self.store, self._parent, self._stage)
            left = _left(self._pipeline, except_for=self._stage)
            for name, error in _send_stages(client, self._parent, self._pipeline, left).items():
                self._warn(reason_of(error), is_refusal(error), name)
        self._sender = sender

    def _warn(self, problem: str, refused: bool = False, stage: str = "") -> None:
        if not self._warned:
            log.warning(
                "MLflow at %s %s (%s): continuing without it; everything is in %s,"
                " and the next stage, or to a database `smalti ui %s`, sends what is missing",
                mask(self.store.uri),
                "answers, and refuses" if refused else "is not usable",
                mask(problem),
                self.store.run_directory / (stage or self._stage),
                self.store.run_directory,
            )
        self._warned = True


def is_left_to_others(config: PipelineConfig, stage: str) -> bool:
    """Whether a stage of this name, in this process, writes its files alone and sends nothing to MLflow."""
    return _is_shared_file(config) and stage != stages_of(config)[-1].name


def _is_shared_file(config: PipelineConfig) -> bool:
    return SUBMITTED_VARIABLE in os.environ and sqlite_file(Store(config).uri) is not None


class Follower:
    """Sends what stages write that leave MLflow to others, again and again while they work."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._senders: dict[str, Sender] = {}

    def send(self) -> None:
        """What is new. Raises what MLflow and its store raise."""
        runs = RunDirectory(self._config.run_directory)
        at_work = [name for name in _at_work(self._config) if Sender.is_left(runs.stage(name))]
        self._senders = {name: sender for name, sender in self._senders.items() if name in at_work}
        if not self._config.tracking.enabled or not (at_work or _left(self._config)):
            return
        _, failed = _send_left(self._config)
        with _lock(self._config):
            store = Store(self._config)
            client = store.connect()
            for name in at_work:
                sender = self._senders.pop(name, None) or Sender(
                    client, store, Parent(client, store, self._config), name
                )
                sender.send()
                self._senders[name] = sender  # not where that failed: the next one asks anew what MLflow has
        for error in failed.values():
            raise error


def catch_up(config: PipelineConfig) -> list[str]:
    """Send what MLflow does not have of this run's stages that nobody works on; the names of those.

    A store that is not usable gets a warning.
    """
    if not config.tracking.enabled:
        return []
    try:
        sent, failed = _send_left(config)
    except Exception as error:  # MLflow's, SQLAlchemy's, of the network
        log.warning("MLflow at %s did not take what is missing: %s", mask(Store(config).uri), reason_of(error))
        return []
    for name, why in failed.items():
        log.warning("MLflow did not take what is missing of %s: %s", config.run_directory / name, reason_of(why))
    return sent


def _send_left(config: PipelineConfig) -> tuple[list[str], dict[str, Exception]]:
    """The stages that were sent, and why others were not."""
    names = _left(config)
    with _lock(config):
        store = Store(config)
        client = store.connect()
        parent = Parent(client, store, config)
        failed = _send_stages(client, parent, config, names)
        if not _at_work(config):
            parent.update(_parent_status(config))
    return [name for name in names if name not in failed], failed


def _send_stages(
    client: MlflowClient, parent: Parent, config: PipelineConfig, names: Sequence[str]
) -> dict[str, Exception]:
    """Send stages on which nobody works, each whatever became of the others; why some could not be sent."""
    failed: dict[str, Exception] = {}
    for name in names:
        try:
            Sender(client, Store(config), parent, name).finish(_how_it_ended(config, name))
        except Exception as error:  # MLflow's, SQLAlchemy's, of the network, of the stage's own files
            failed[name] = error
    return failed


def _lock(config: PipelineConfig) -> Lock:
    return Lock(RunDirectory(config.run_directory).lock("mlflow"), "the run in MLflow", wait_s=_LOCK_WAIT_S)


def _left(config: PipelineConfig, except_for: str = "") -> list[str]:
    """The stages of which MLflow may lack something, and on which no process works."""
    runs, busy = RunDirectory(config.run_directory), {except_for, *_at_work(config)}
    directories = {stage.name: runs.stage(stage.name) for stage in stages_of(config) if stage.name not in busy}
    return [
        name
        for name, directory in directories.items()
        if ((directory / EVENTS).exists() or (directory / "mlflow.json").exists())
        and not Sender.is_complete(directory, Store(config), runs.path)
    ]


def _at_work(config: PipelineConfig) -> list[str]:
    runs = RunDirectory(config.run_directory)
    return [stage.name for stage in stages_of(config) if owner_of(runs.lock(stage.name))]


def _how_it_ended(config: PipelineConfig, stage: str) -> Status:
    """How a stage ended on which no process works."""
    runs = RunDirectory(config.run_directory)
    return "FINISHED" if runs.manifest(stage) else Sender.recorded_end(runs.stage(stage)) or "KILLED"


def _parent_status(config: PipelineConfig, stage: str = "", status: Status = "FINISHED") -> str:
    """The pipeline's status when `stage` ended with `status`: SCHEDULED where finished stages have others to come."""
    if [name for name in _at_work(config) if name != stage]:
        return "RUNNING"
    if status != "FINISHED":
        return status
    directory: Path = config.run_directory
    # `_SUCCESS` alone: whether a stage is up to date is asked by the runner.
    finished = all((directory / other.name / "_SUCCESS").exists() for other in stages_of(config))
    return "FINISHED" if finished else "SCHEDULED"
