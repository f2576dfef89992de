"""A config, or a run: its stages can start, its tracking answers, its extractors have their weights."""

from __future__ import annotations

import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil

from pipeline.config.evaluate import EXTRACTORS
from pipeline.config.pipeline import PipelineConfig
from pipeline.core.errors import UserError
from pipeline.core.lock import Owner, owner_of
from pipeline.core.writable import check_writable
from pipeline.doctor.finding import Finding, fail, note, ok, warn
from pipeline.orchestration.graph import check_before_start, stages_of
from pipeline.orchestration.local_runner import local_processes
from pipeline.orchestration.mlflow_store import Store
from pipeline.orchestration.start_model import made_from
from pipeline.slurm.cluster import load_cluster

_LOCKED_S = 3.0  # longer than any write of MLflow


def run_directory(config: PipelineConfig) -> Iterator[Finding]:
    folder = config.run_directory
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        check_writable(folder / "config.yaml")
    except UserError as error:
        yield fail("run directory", f"{error} (runs=…)")
        return
    for path in made:
        path.rmdir()
    held = {path.stem: owner for path in sorted((folder / "locks").glob("*.json")) if (owner := owner_of(path))}
    if held:
        said = [f"{name} by process {owner['pid']} on {owner['host']}" for name, owner in held.items()]
        yield note("run directory", f"{folder}: being written now: {', '.join(said)}")
    else:
        yield ok("run directory", f"{folder}")
    for name, owner in held.items():
        if _is_stopped(owner):
            yield warn(
                f"lock {name}",
                f"process {owner['pid']}, which holds it, is stopped (Ctrl-Z, SIGSTOP) and keeps all others waiting:"
                f" `kill -CONT {owner['pid']}`, or end it",
            )


def _is_stopped(owner: Owner) -> bool:
    """Of a process of this machine; others cannot be seen."""
    with suppress(psutil.Error):
        process = psutil.Process(owner["pid"])
        return owner["host"] == socket.gethostname() and bool(process.status() == psutil.STATUS_STOPPED)
    return False


def tracking(config: PipelineConfig) -> Iterator[Finding]:
    if not config.tracking.enabled:
        yield note("mlflow", "tracking.enabled: false: metrics stay in metrics.jsonl")
        return
    yield from _database_of_before(config)
    with tempfile.TemporaryDirectory() as temporary:
        # The run's own database is made at its start; whether MLflow works here is asked of another one.
        probe = config.model_copy(update={"runs": Path(temporary)})
        store = Store(config) if config.tracking.uri else Store(probe)
        probe.run_directory.mkdir(parents=True, exist_ok=True)
        try:
            store.connect().search_experiments(max_results=1)
        except Exception as error:  # MLflow's, SQLAlchemy's, requests', of many kinds
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            yield fail("mlflow", f"expected a store that answers at {store.uri}, found: {said}: mend tracking.uri,"
                                 " start the server, or set tracking.enabled=false")  # fmt: skip
        else:
            yield ok("mlflow", config.tracking.uri or "a database in the run directory")


def _database_of_before(config: PipelineConfig) -> Iterator[Finding]:
    """What is wrong with the database that the run has already; nothing is written to it."""
    database = config.run_directory / "mlflow.db"
    if config.tracking.uri or not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=_LOCKED_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        yield warn(
            "mlflow.db",
            f"expected a database that can be written at {database}, found: {error}: end what uses it"
            f" (`fuser {database}`), or mend its rights; until then metrics stay in metrics.jsonl",
        )
    except sqlite3.DatabaseError as error:
        yield warn(
            "mlflow.db",
            f"expected a database at {database}, found: {error}: the next stage, or `smalti ui`, moves it aside and"
            " sends all again",
        )


def stages(config: PipelineConfig, cluster: Path | None) -> Iterator[Finding]:
    """What `smalti run` and `submit` refuse before anything starts; with a cluster file, at its processes."""
    resources = load_cluster(cluster).resources if cluster else None
    check_before_start(
        config, lambda stage: resources(stage).world_size if resources else local_processes(config, stage)
    )
    for stage in stages_of(config):
        if stage.trains:
            made_from(config, stage, config.run_directory / stage.name)
    yield ok("stages", f"{len(stages_of(config))} of them can start")


def extractors(config: PipelineConfig | None) -> Iterator[Finding]:
    """Weights of each extractor; those that the config does not use are notes."""
    import torch

    from pipeline.extractors.registry import load_extractor

    used = config.evaluate.extractor if config else None
    for name in EXTRACTORS:
        weights = config.evaluate.weights if config and name == used else None
        if name != used and name in ("clip", "dinov2"):
            continue  # without a folder there is nothing to look at
        try:
            load_extractor(name, torch.device("cpu"), weights=weights)
        except UserError as error:
            yield fail(f"weights {name}", str(error)) if name == used else note(f"weights {name}", str(error))
        else:
            yield ok(f"weights {name}", "there")
