"""The run directory: where stages write, and what decides whether one is up to date. Imports no torch.

    runs/<name>/
      config.yaml  run.json  code/  mlflow.db  locks/  superseded/
      <stage>/  config.yaml identity.json metrics.jsonl checkpoints/ … manifest.json _SUCCESS

`identity.json` records the config and the inputs that a stage directory is made from; `manifest.json` adds
the outputs, and `_SUCCESS`, written last, holds the manifest's hash. A stage is up to date when
`_SUCCESS` matches today's config and today's inputs (`stale_reasons`). A directory made from another config is
moved to `superseded/`, and restored from there if that config returns.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.config.base import differences, digest, to_yaml
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.renamed import with_current_names
from pipeline.core.atomic_io import read_json, remove_leftovers, sha256_file, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import FileRecord, first_fault, record
from pipeline.orchestration.code_snapshot import record_version
from pipeline.orchestration.graph import Stage, inputs_of, stage_identity, stage_named

log = logging.getLogger(__name__)


class Manifest(TypedDict):
    """manifest.json of a finished stage."""

    stage: str
    config: dict[str, object]  # `graph.stage_identity`
    inputs: dict[str, str]  # the hash of each input's manifest
    outputs: dict[str, FileRecord]
    hash: str  # of all above: what was made from what, and no times, paths or versions
    code: NotRequired[dict[str, object] | None]  # version.json of the run's code


class RunDirectory:
    """The paths and manifests of a run, and which of its stages are up to date. Creating the object writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str) -> Path:
        """The directory of a stage."""
        return self.path / name

    def lock(self, name: str) -> Path:
        """The lock file of a stage, or of the run."""
        return self.path / "locks" / f"{name}.json"

    def check(self, source: str, take_over: bool = False) -> None:
        """Check that the directory may hold this run; `source` is the name of its config file.

        Raises:
            UserError: it holds other files, or the run of another config file (allowed with `take_over`).
        """
        record = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"expected a run directory at {self.path}, found a file: set name=… or runs=…")
        if record.exists():
            known = read_json(record)["config_file"]
            if known != source and not take_over:
                raise UserError(
                    f"{self.path} holds the run of {known}, found another config, {source}, with the same name:"
                    f" give it its own name (name=…), or pass --take-over if the file was only renamed"
                )
        elif self.path.is_dir() and any(path.name != "locks" for path in self.path.iterdir()):
            raise UserError(
                f"expected an empty or a Smalti run directory at {self.path}, found other files: set name=… or runs=…"
            )

    def open(self, config: PipelineConfig, source: str) -> None:
        """Create the directory, record the config and the code. Call `check` first, and hold the lock "run"."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", {"name": config.name, "config_file": source})
        write_atomic(self.path / "config.yaml", to_yaml(config))
        record_version(self.path / "code")

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a finished stage; None if it is not finished, or the manifest was changed."""
        success, path = self.stage(name) / "_SUCCESS", self.stage(name) / "manifest.json"
        if not (success.exists() and path.exists() and success.read_text().strip() == sha256_file(path)):
            return None
        manifest: Manifest = read_json(path)
        return {**manifest, "config": with_current_names(manifest["config"])}

    def identity(self, config: PipelineConfig, stage: Stage) -> dict[str, object]:
        """What decides this stage's result: its config and the hashes of its finished inputs.

        Raises:
            UserError: an input is missing, unfinished or damaged.
        """
        inputs: dict[str, str] = {}
        for name in inputs_of(config, stage):
            manifest = self.manifest(name)
            if manifest is None:
                raise UserError(f"{stage.name} needs {name}, which is not finished in {self.path}: run {name} first")
            self._check_outputs(name, manifest, reader=stage.name)
            inputs[name] = manifest["hash"]
        return {"config": stage_identity(config, stage.name), "inputs": inputs}

    def stale_reasons(self, config: PipelineConfig, stage: Stage) -> list[str]:
        """Why this stage must run; empty if it is up to date."""
        manifest = self.manifest(stage.name)
        if manifest is None:
            return ["not finished"] if self.stage(stage.name).exists() else ["not run yet"]
        reasons = differences(manifest["config"], stage_identity(config, stage.name))
        for name in inputs_of(config, stage):
            current = self.manifest(name)
            if name not in manifest["inputs"]:
                reasons.append(f"input {name} is new")
            elif current is None or manifest["inputs"][name] != current["hash"]:
                reasons.append(f"input {name} changed")
        if not reasons:
            try:
                self._check_outputs(stage.name, manifest, reader=stage.name)
            except UserError as error:
                reasons.append(str(error))
        return reasons

    def stale_inputs(self, config: PipelineConfig, stage: Stage) -> list[str]:
        """Why inputs of this stage, direct or not, must run first; empty if all are up to date."""
        reasons: list[str] = []
        for name in inputs_of(config, stage):
            upstream = stage_named(name)
            own = [f"{name}: {reason}" for reason in self.stale_reasons(config, upstream)]
            reasons += self.stale_inputs(config, upstream) or own
        return list(dict.fromkeys(reasons))

    def begin(self, config: PipelineConfig, stage: Stage) -> bool:
        """Make the stage directory ready; False if the stage is up to date.

        A directory of the same identity is continued; one of another identity is moved to `superseded/`.
        """
        directory, identity = self.stage(stage.name), self.identity(config, stage)
        if directory.exists() and _recorded_identity(directory) != identity:
            self._supersede(directory)
        superseded = self._superseded_path(stage.name, identity)
        if not directory.exists() and superseded.is_dir() and _recorded_identity(superseded) == identity:
            superseded.rename(directory)
            log.info("%s: restored from %s", stage.name, superseded)
        if self.manifest(stage.name) is not None and not self.stale_reasons(config, stage):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_SUCCESS").unlink(missing_ok=True)
        remove_leftovers(directory)
        write_json(directory / "identity.json", identity)
        write_atomic(directory / "config.yaml", to_yaml(config.section(stage.name)))
        return True

    def begin_task(self, config: PipelineConfig, stage: Stage, task: tuple[int, int]) -> bool:
        """Like `begin`, for one of several array tasks: the work of the others stays. Hold a lock meanwhile."""
        directory = self.stage(stage.name)
        if not directory.exists() or _recorded_identity(directory) != self.identity(config, stage):
            self.begin(config, stage)
        return not (self.task_marker(stage.name, task).exists() or self.manifest(stage.name))

    def finish_task(self, stage: Stage, task: tuple[int, int]) -> None:
        """Record that an array task, (index, count), has done its share."""
        write_atomic(self.task_marker(stage.name, task), "")

    def task_marker(self, name: str, task: tuple[int, int]) -> Path:
        """The file that exists when an array task has done its share."""
        index, count = task
        return self.stage(name) / "tasks" / f"{index}-of-{count}"

    def missing_tasks(self, config: PipelineConfig, stage: Stage, tasks: int) -> list[int]:
        """The array tasks that have not done their share yet. The inputs must be finished."""
        same = _recorded_identity(self.stage(stage.name)) == self.identity(config, stage)
        return [i for i in range(tasks) if not (same and self.task_marker(stage.name, (i, tasks)).exists())]

    def finish(self, stage: Stage, outputs: dict[Path, str | None]) -> None:
        """Write manifest.json and then _SUCCESS. `outputs`: each path, with its SHA-256 if that is known already."""
        directory = self.stage(stage.name)
        made_from = read_json(directory / "identity.json")
        files = {str(path.relative_to(directory)): record(path, sha256) for path, sha256 in sorted(outputs.items())}
        # The hash covers what was made from what, and no times or versions: the same result has the same hash.
        manifest = {"stage": stage.name, **made_from, "outputs": files}
        manifest["hash"] = digest(manifest)
        manifest["code"] = read_json(self.path / "code" / "version.json") if (self.path / "code").exists() else None
        write_json(directory / "manifest.json", manifest)
        write_atomic(directory / "_SUCCESS", sha256_file(directory / "manifest.json") + "\n")

    def _check_outputs(self, name: str, manifest: Manifest, reader: str) -> None:
        # Sizes alone: hashing gigabytes would take longer than many a stage.
        if fault := first_fault(self.stage(name), manifest["outputs"], hashed=False):
            raise UserError(
                f"{reader}: {fault}: restore it, or delete {self.stage(name) / '_SUCCESS'} and run {name} again"
            )

    def _superseded_path(self, name: str, identity: object) -> Path:
        return self.path / "superseded" / f"{name}-{digest(identity)[:12]}"

    def _supersede(self, directory: Path) -> None:
        target = self._superseded_path(directory.name, _recorded_identity(directory))
        if target.exists():  # from an earlier time with the same config; the newer one is at least as far
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)
        log.info("%s: moved the outputs of another config to %s (safe to delete)", directory.name, target)


def _recorded_identity(directory: Path) -> object:
    """The identity that a stage directory is made from; None if there is none."""
    path = directory / "identity.json"
    return with_current_names(read_json(path)) if path.exists() else None


def config_of(run_directory: Path) -> Path:
    """The config file of an existing run.

    Raises:
        UserError: there is none.
    """
    path = run_directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"expected a run directory, found no config.yaml in {run_directory}: give runs/<name>")
    return path


def source_name(path: str) -> str:
    """The name under which a run directory records its config file; a run's own copy stands for the original."""
    record = Path(path).parent / "run.json"
    if Path(path).name == "config.yaml" and record.exists():
        return str(read_json(record)["config_file"])
    return Path(path).name
