"""MLflow's store of a run: its address, its database made whole, and where artifacts lie.

The default is the run's own: mlflow.db and mlartifacts/ in the run directory, which move and are copied with it. A
database that several runs share has its artifacts beside it; a server decides for itself.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.credentials import put_password_back
from pipeline.core.lock import Lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_DATABASES = ("postgresql", "mysql", "mssql")
_WORDS = {"@": " at ", "=": " ", "%": " percent", "∞": " infinity"}


def import_mlflow() -> None:
    """Import what a store needs. Two threads that import at one time (MLflow here, DeepSpeed there) may wait for each
    other for ever, or fail: CPython's issues 91351 and 83065."""
    _quiet()
    from mlflow.store.tracking import rest_store, sqlalchemy_store  # noqa: F401


def default_uri(run_directory: Path) -> str:
    """The address of the run's own database."""
    return f"sqlite:///{(run_directory / 'mlflow.db').absolute()}"


class Store:
    """Where MLflow keeps a run. `own`: in its own run directory."""

    def __init__(self, config: PipelineConfig) -> None:
        self.run_directory = config.run_directory
        self.uri = config.tracking.uri or default_uri(config.run_directory)  # without a password
        self.own = self.uri == default_uri(config.run_directory)
        self._experiment = config.tracking.experiment

    def connect(self) -> MlflowClient:
        """A client whose store answers. Hold the lock of the run's MLflow meanwhile."""
        _quiet()
        from mlflow import MlflowClient

        database = sqlite_file(self.uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
            if self.own:
                self._prepare_own(database)
            elif not database.exists():
                with Lock(database.with_name(f".{database.name}.lock.json"), f"the start of {database}", wait_s=300):
                    _create(database, self._artifacts() or "")
        return MlflowClient(tracking_uri=put_password_back(self.uri))

    def experiment_id(self, client: MlflowClient) -> str:
        """The experiment of this run; made if there is none."""
        found = client.get_experiment_by_name(self._experiment)
        if found and not self.own and self._is_in_a_run(found.artifact_location):
            # A version before put the artifacts of all runs into the folder of the first.
            self._experiment += "-shared"
            found = client.get_experiment_by_name(self._experiment)
        return found.experiment_id if found else client.create_experiment(self._experiment, self._artifacts())

    def _artifacts(self) -> str | None:
        if self.own:
            return (self.run_directory / "mlartifacts").absolute().as_uri()
        if database := sqlite_file(self.uri):
            return (database.parent / "mlartifacts").as_uri()
        if self.uri.startswith(_DATABASES):
            return (self.run_directory.parent / "mlartifacts").absolute().as_uri()
        return None

    def _is_in_a_run(self, location: str) -> bool:
        return location.startswith("file:") and (Path(unquote(urlsplit(location).path)).parent / "run.json").exists()

    def _prepare_own(self, database: Path) -> None:
        """Make the run's database, or bring it in order: a copied one points at the artifacts of the original."""
        location = str(self._artifacts())
        if database.exists() and (damage := _damage(database)):
            aside = database.with_name(f"{database.name}.damaged-{uuid.uuid4().hex[:8]}")
            database.rename(aside)
            log.warning("%s is damaged (%s): moved to %s; all is sent again", database, damage, aside.name)
        if database.exists():
            _relocate(database, location)
        else:
            _create(database, location)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite database; None if the address is of another kind."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if path != uri and path and ":memory:" not in path else None


def legal_name(name: str) -> str:
    """The name of a metric or parameter in characters that MLflow allows: `R@1` becomes `R at 1`."""
    for sign, word in _WORDS.items():
        name = name.replace(sign, word)
    name = re.sub(r"[^\w/ .:-]", "_", name)
    parts = [part for part in name.split("/") if part.strip(" .")]  # no "..", nothing that starts with a slash
    return re.sub(" +", " ", "/".join(parts)).strip()[:250] or "_"


def _create(database: Path, artifacts: str) -> None:
    """Make a database whole: a process may be killed while MLflow makes its tables, which takes seconds."""
    if database.exists():
        return
    for leftover in database.parent.glob(f".{database.name}.*.tmp*"):
        leftover.unlink(missing_ok=True)
    temporary = database.with_name(f".{database.name}.{uuid.uuid4().hex}.tmp")
    _open_store(f"sqlite:///{temporary}", artifacts or str(database.parent))
    temporary.replace(database)


def _open_store(address: str, artifacts: str) -> None:
    """Let MLflow open the database at `address`, which makes or checks its tables, and close it."""
    from mlflow.store.tracking import sqlalchemy_store

    store: Any = sqlalchemy_store.SqlAlchemyStore
    store(address, artifacts).engine.dispose()


def _damage(database: Path) -> str | None:
    """What keeps MLflow from using the database; None if it is whole, or somebody else writes it now."""
    address = f"sqlite:///{database.parent}/./{database.name}"  # MLflow keeps what it opened, by address
    try:
        _open_store(address, str(database.parent))
    except Exception as error:  # SQLAlchemy's and MLflow's own, of many kinds
        return None if "locked" in str(error) else (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _relocate(database: Path, location: str) -> None:
    """Let what was logged into the mlartifacts/ of another place of this run be found in this one."""
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (old,) in rows:
            if old and old != location and old.startswith("file:") and old.rstrip("/").endswith("/mlartifacts"):
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE artifact_uri LIKE ? || '/%'",
                    (location, len(old) + 1, old),
                )
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (location, old)
                )


def _quiet() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # the mirror reports a failure, once
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for noisy in ("alembic", "mlflow", "sqlalchemy", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
