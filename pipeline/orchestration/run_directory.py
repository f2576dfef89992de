"""The run directory: how stages talk. Knows no torch.

    runs/<name>/
      config.yaml  run.json  code/  mlflow.db  locks/  superseded/
      <stage>/  config.yaml identity.json metrics.jsonl checkpoints/ … manifest.json _SUCCESS

`identity.json` says from which config and inputs a stage directory is being made; `manifest.json` adds
the outputs, and `_SUCCESS`, written last, holds the manifest's hash. A stage is up to date when
`_SUCCESS` matches today's config and today's inputs. A directory made from something else is set aside
in `superseded/`, and taken back from there if its config returns.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.base import differences, digest, to_yaml
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.renamed import with_current_names
from pipeline.core.atomic_io import read_json, sha256_file, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.orchestration.code_snapshot import record_version
from pipeline.orchestration.graph import Stage, inputs_of, stage_identity, stage_named

log = logging.getLogger(__name__)


class RunDirectory:
    """Paths, manifests and freshness of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str) -> Path:
        return self.path / name

    def lock(self, name: str) -> Path:
        return self.path / "locks" / f"{name}.json"

    def check(self, source: str, take_over: bool = False) -> None:
        """Raises UserError if the directory holds something else, or the run of another config file."""
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
        """Create the directory and record the config and the code. The caller has checked it, and holds its lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", {"name": config.name, "config_file": source})
        write_atomic(self.path / "config.yaml", to_yaml(config))
        record_version(self.path / "code")

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished stage; None if it is not finished or not as it was written."""
        success, path = self.stage(name) / "_SUCCESS", self.stage(name) / "manifest.json"
        if not (success.exists() and path.exists() and success.read_text().strip() == sha256_file(path)):
            return None
        manifest: dict[str, Any] = read_json(path)
        return manifest | {"config": with_current_names(manifest["config"])}

    def identity(self, config: PipelineConfig, stage: Stage) -> dict[str, Any]:
        """What this stage's result is a function of: its config and the hashes of its finished inputs.

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
        """Why this stage must run, a reason a line; empty if it is up to date."""
        manifest = self.manifest(stage.name)
        if manifest is None:
            return ["not finished"] if self.stage(stage.name).exists() else ["not run yet"]
        reasons = differences(manifest["config"], stage_identity(config, stage.name))
        for name in inputs_of(config, stage):
            current = self.manifest(name)
            if current is None or manifest["inputs"].get(name) != current["hash"]:
                reasons.append(f"its input {name} is another one")
        if not reasons:
            try:
                self._check_outputs(stage.name, manifest, reader=stage.name)
            except UserError as error:
                reasons.append(str(error))
        return reasons

    def stale_inputs(self, config: PipelineConfig, stage: Stage) -> list[str]:
        """Inputs (direct or not) that were made from another config than this one, a reason a line."""
        reasons: list[str] = []
        for name in inputs_of(config, stage):
            upstream = stage_named(name)
            own = [f"{name}: {reason}" for reason in self.stale_reasons(config, upstream)]
            reasons += self.stale_inputs(config, upstream) or own
        return list(dict.fromkeys(reasons))

    def begin(self, config: PipelineConfig, stage: Stage) -> bool:
        """Make the stage directory ready for `identity`; False if there is nothing left to do.

        A directory of the same identity is gone on with; one of another identity is set aside.
        """
        directory, identity = self.stage(stage.name), self.identity(config, stage)
        if directory.exists() and _identity_of(directory) != identity:
            self._set_aside(directory)
        shelved = self._shelf(stage.name, identity)
        if not directory.exists() and shelved.is_dir() and _identity_of(shelved) == identity:
            shelved.rename(directory)
            log.info("%s: taken back from %s", stage.name, shelved)
        if self.manifest(stage.name) is not None and not self.stale_reasons(config, stage):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_SUCCESS").unlink(missing_ok=True)
        for leftover in directory.rglob(".*.tmp"):
            leftover.unlink()
        write_json(directory / "identity.json", identity)
        write_atomic(directory / "config.yaml", to_yaml(config.section(stage.name)))
        return True

    def begin_task(self, config: PipelineConfig, stage: Stage, task: tuple[int, int]) -> bool:
        """As `begin`, for one of several array tasks: its neighbours' work stays. The caller holds a lock."""
        directory = self.stage(stage.name)
        if not directory.exists() or _identity_of(directory) != self.identity(config, stage):
            self.begin(config, stage)
        return not (self.task_marker(stage.name, task).exists() or self.manifest(stage.name))

    def finish_task(self, stage: Stage, task: tuple[int, int]) -> None:
        write_atomic(self.task_marker(stage.name, task), "")

    def task_marker(self, name: str, task: tuple[int, int]) -> Path:
        """The file that says that an array task has done its share."""
        which, of = task
        return self.stage(name) / "tasks" / f"{which}-of-{of}"

    def missing_tasks(self, config: PipelineConfig, stage: Stage, tasks: int) -> list[int]:
        """Which array tasks have not done their share yet. The inputs must be finished."""
        same = _identity_of(self.stage(stage.name)) == self.identity(config, stage)
        return [i for i in range(tasks) if not (same and self.task_marker(stage.name, (i, tasks)).exists())]

    def finish(self, stage: Stage, outputs: dict[Path, str | None]) -> None:
        """Write manifest.json and then _SUCCESS. `outputs`: paths, and their SHA-256 where it is known."""
        directory = self.stage(stage.name)
        made_from = read_json(directory / "identity.json")
        files = {
            str(path.relative_to(directory)): {
                "bytes": path.stat().st_size,
                "sha256": sha256 or sha256_file(path),
            }
            for path, sha256 in sorted(outputs.items())
        }
        # The hash covers what was made from what, and no times or versions: the same result has the same hash.
        manifest = {"stage": stage.name, **made_from, "outputs": files}
        manifest["hash"] = digest(manifest)
        manifest["code"] = read_json(self.path / "code" / "version.json") if (self.path / "code").exists() else None
        write_json(directory / "manifest.json", manifest)
        write_atomic(directory / "_SUCCESS", sha256_file(directory / "manifest.json") + "\n")

    def _check_outputs(self, name: str, manifest: dict[str, Any], reader: str) -> None:
        for relative, recorded in manifest["outputs"].items():
            path = self.stage(name) / relative
            found = path.stat().st_size if path.is_file() else None
            if found != recorded["bytes"]:
                what = "no file" if found is None else f"{found} bytes"
                raise UserError(
                    f"{reader}: expected {recorded['bytes']} bytes, found {what}, at {path}:"
                    f" restore it, or delete {self.stage(name) / '_SUCCESS'} and run {name} again"
                )

    def _shelf(self, name: str, identity: Any) -> Path:
        return self.path / "superseded" / f"{name}-{digest(identity)[:12]}"

    def _set_aside(self, directory: Path) -> None:
        identity = _identity_of(directory)
        shelf = self._shelf(directory.name, identity)
        if shelf.exists():  # the same thing was set aside before; the newer one is at least as far
            shutil.rmtree(shelf)
        shelf.parent.mkdir(exist_ok=True)
        directory.rename(shelf)
        log.info("%s: what another config had made is now in %s (delete it when you like)", directory.name, shelf)


def _identity_of(directory: Path) -> Any:
    path = directory / "identity.json"
    return with_current_names(read_json(path)) if path.exists() else None


def config_of(run_directory: Path) -> Path:
    """The config of an existing run."""
    path = run_directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"expected a run directory, found no config.yaml in {run_directory}: give runs/<name>")
    return path


def source_name(path: str) -> str:
    """How a run directory remembers the config file it was made from; a run's own copy stands for the original."""
    record = Path(path).parent / "run.json"
    if Path(path).name == "config.yaml" and record.exists():
        return str(read_json(record)["config_file"])
    return Path(path).name
