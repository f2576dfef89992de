"""The pipeline's own MLflow run: its config as parameters, the commit as a tag, the report, the best metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.base import digest, identity
from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json, sha256_file, write_json
from pipeline.core.errors import UserError
from pipeline.orchestration.going_on import recorded_identity
from pipeline.orchestration.graph import stage_named, stages_of
from pipeline.orchestration.mlflow_sender import RECORD, is_active, known_run, new_record, send_parameters
from pipeline.orchestration.mlflow_store import Store, legal_name
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.tracking import METRICS, metrics_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

# File in the run directory -> folder in MLflow, which is its stage.
_ARTIFACTS = {"config.yaml": None, "report/index.html": "report"}
# In the names of what trainings validate.
_LOWER_IS_BETTER = ("loss", "bits/image_token")
_HIGHER_IS_BETTER = ("psnr", "ssim", "accuracy", "reward", " R@")


class Parent:
    """The pipeline's run. A config that makes other results is another one, to which the stages move that it keeps."""

    def __init__(self, client: MlflowClient, store: Store, config: PipelineConfig) -> None:
        self.directory = store.run_directory
        self._client = client
        self._config = config
        parameters = identity(config)
        which = digest(parameters)[:16]
        self.record: dict[str, Any] = known_run(client, store, self.directory)
        runs = self.record.get("runs") or ({which: self.run_id} if self.record else {})
        moved = bool(self.record) and runs.get(which) != self.run_id
        if moved and client.get_run(self.run_id).info.status in ("RUNNING", "SCHEDULED"):
            client.set_terminated(self.run_id, "KILLED")
        if which not in runs or not is_active(client, runs[which]):
            runs[which] = client.create_run(store.experiment_id(client), run_name=config.name).info.run_id
        if is_another := moved or not self.record:
            self.record = new_record(store, runs[which])
        self.record["runs"] = runs  # of the configs that this directory has had
        self.experiment_id = client.get_run(self.run_id).info.experiment_id
        self._save()
        send_parameters(client, self.run_id, parameters)
        if is_another:
            self._adopt(store)

    @property
    def run_id(self) -> str:
        """The id of the pipeline's MLflow run."""
        return str(self.record["run_id"])

    def update(self, status: str) -> None:
        """Send what changed of the run as a whole, and its status."""
        try:
            for name, value in _tags(self.directory).items():
                self._client.set_tag(self.run_id, name, value)
            self._send_metrics()
            self._send_artifacts()
        finally:
            if status in ("RUNNING", "SCHEDULED"):
                self._client.update_run(self.run_id, status=status)
            else:
                self._client.set_terminated(self.run_id, status)
        self._save()

    def holds(self, stage: str) -> bool:
        """Whether what lies in the stage's directory is of this config and of today's inputs, finished or not."""
        runs, named = RunDirectory(self.directory), stage_named(stage)
        try:
            wanted = runs.identity(self._config, named, files=False)
            return recorded_identity(runs.stage(stage)) == wanted and not runs.stale_inputs(self._config, named, False)
        except UserError:  # an input is not there
            return False

    def _held(self) -> list[str]:
        return [stage.name for stage in stages_of(self._config) if self.holds(stage.name)]

    def _adopt(self, store: Store) -> None:
        """Put the stages that have a run below this one."""
        for stage in self._held():
            if child := known_run(self._client, store, self.directory / stage):
                self._client.set_tag(child["run_id"], "mlflow.parentRunId", self.run_id)

    def _send_metrics(self) -> None:
        sent = self.record.setdefault("metrics", {})
        for stage in self._held():
            for name, value in _best(self.directory / stage / METRICS).items():
                key = legal_name(f"{stage}/{name}")
                if sent.get(key) != value:
                    self._client.log_metric(self.run_id, key, value)
                    sent[key] = value

    def _send_artifacts(self) -> None:
        sent = self.record.setdefault("files", {})
        for name, folder in _ARTIFACTS.items():
            path = self.directory / name
            if folder and not self.holds(folder):
                continue
            if path.is_file() and sent.get(name) != (sha256 := sha256_file(path)):
                self._client.log_artifact(self.run_id, str(path), artifact_path=folder)
                sent[name] = sha256

    def _save(self) -> None:
        write_json(self.directory / RECORD, self.record)


def _tags(directory: Path) -> dict[str, str]:
    try:
        version = dict(read_json(directory / "code" / "version.json"))
    except (OSError, UserError, TypeError, ValueError):
        return {}
    tags = {"smalti.version": version.get("version"), "mlflow.source.git.commit": version.get("commit")}
    changed = {"smalti.uncommitted_changes": "true"} if version.get("changed") else {}
    return {name: str(value) for name, value in tags.items() if value} | changed


def _best(path: Path) -> dict[str, float]:
    """Of a metrics.jsonl, the best value of what was validated, and the last of what was measured once at the end."""
    best: dict[str, float] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        found = metrics_of(line)
        for name, value in found[2].items() if found else ():
            if name.startswith("val/") and value == value:
                best[name] = _better(name, value, best.get(name, value))
            elif name.startswith("retrieval/") or (path.parent.name == "evaluate" and not name.startswith("system/")):
                best[name] = value
    return best


def _better(name: str, new: float, old: float) -> float:
    """The better one of two values; the new one where the name does not say which is, as of how codes are used."""
    if any(word in name for word in _LOWER_IS_BETTER):
        return min(new, old)
    return max(new, old) if any(word in name for word in _HIGHER_IS_BETTER) else new
