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
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pipeline.config.base import differences, digest, to_yaml
from pipeline.config.pipeline import PipelineConfig, is_run_config
from pipeline.core.atomic_io import read_json, remove_leftovers, sha256_file, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock
from pipeline.core.manifest import first_fault, record
from pipeline.orchestration.code_snapshot import record_version
from pipeline.orchestration.going_on import Amendment, amendments_of, new_amendments, recorded_identity
from pipeline.orchestration.graph import Stage, inputs_of, stage_named, stages_of
from pipeline.orchestration.manifests import Manifest, Manifests
from pipeline.orchestration.outside import changes, record_stamp, recorded_stamp
from pipeline.orchestration.run_record import FORMAT, recorded_source
from pipeline.orchestration.start_model import made_from

log = logging.getLogger(__name__)

# What may lie in a directory before its run.json does: locks, and the files of `submit --dry-run`.
_BEFORE_A_RUN = {"locks", "slurm", "logs"}
# Not part of a finished stage's result, and not taken over by a run that branches off.
_OF_ONE_RUN_ALONE = shutil.ignore_patterns("mlflow.json", "checkpoints", "tasks", "_SUCCESS", ".*.tmp")


class RunDirectory:
    """The paths and manifests of a run, and which of its stages are up to date. Creating the object writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifests = Manifests(path)

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
        try:
            empty = not self.path.exists() or (self.path.is_dir() and _is_before_a_run(self.path))
            ours = is_run_config(self.path / "config.yaml")
        except OSError as error:
            raise _unusable(self.path, error) from error
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"expected a run directory at {self.path}, found a file: set name=… or runs=…")
        if not ours and not empty:
            raise UserError(
                f"expected an empty or a Smalti run directory at {self.path}, found other files: set name=… or runs=…"
            )
        if not ours or take_over or not source:
            return
        known = recorded_source(self.path)
        if known != source:
            holds = f"the run of {known}" if known else "a run whose run.json is missing or damaged"
            raise UserError(
                f"{self.path} holds {holds}, found another config, {source}, with the same name:"
                f" give it its own name (name=…), or pass --take-over if the file was only renamed"
            )

    @contextmanager
    def lock_run(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the lock "run", whose holder may call `open`. `wait_s`: for another holder.

        Raises:
            UserError: another process holds it, or the directory cannot be written.
        """
        with writing_in(self.path):
            (self.path / "locks").mkdir(parents=True, exist_ok=True)
            lock = Lock(self.lock("run"), f"the run in {self.path}", wait_s)
            lock.__enter__()
        with ExitStack() as held:
            held.push(lock)
            yield

    def open(self, config: PipelineConfig, source: str) -> None:
        """Create the directory, record the config and the code. Call `check` first, inside of `lock_run`.

        A run that branches off another one starts with those of its finished stages that this config makes, too.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path / "run.json", {"format": FORMAT, "name": config.name, "config_file": source or "config.yaml"}
        )
        write_atomic(self.path / "config.yaml", to_yaml(config))
        record_version(self.path / "code")
        if config.branched_from is not None:
            self._adopt(RunDirectory(config.branched_from), config)

    def _adopt(self, origin: RunDirectory, config: PipelineConfig) -> None:
        """Take every stage over that `origin` has finished and this run would make again the same, but the report."""
        for stage in stages_of(config)[:-1]:
            manifest = origin.manifest(stage.name)
            if manifest is None or self.stage(stage.name).exists() or origin.stale_reasons(config, stage):
                continue
            mine = {name: self.manifest(name) for name in inputs_of(config, stage)}
            if {name: found and found["hash"] for name, found in mine.items()} != manifest["inputs"]:
                continue
            draft, source = self.path / f".{stage.name}.draft", origin.stage(stage.name)
            shutil.rmtree(draft, ignore_errors=True)
            outputs = {str(source / name) for name in manifest["outputs"]}  # of a folder all files are
            shutil.copytree(source, draft, ignore=_OF_ONE_RUN_ALONE, copy_function=partial(_take, outputs))
            shutil.copy2(source / "_SUCCESS", draft / "_SUCCESS")
            draft.rename(self.stage(stage.name))
            log.warning("%s: taken over from %s", stage.name, origin.path)

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a finished stage; None if it is not finished, or the manifest was changed."""
        return self._manifests.of(name)

    def identity(self, config: PipelineConfig, stage: Stage, files: bool = True) -> dict[str, object]:
        """What decides this stage's result: its config and the hashes of its finished inputs.

        `files`: look at the inputs' files, too; not needed behind `stale_inputs`, and takes a while with many.

        Raises:
            UserError: an input is missing, unfinished or damaged.
        """
        inputs: dict[str, str] = {}
        for name in inputs_of(config, stage):
            manifest = self.manifest(name)
            if manifest is None:
                raise UserError(f"{stage.name} needs {name}, which is not finished in {self.path}: run {name} first")
            if files:
                self._check_outputs(name, manifest, reader=stage.name)
            inputs[name] = manifest["hash"]
        return {"config": made_from(config, stage, self.stage(stage.name)), "inputs": inputs}

    def stale_reasons(self, config: PipelineConfig, stage: Stage, files: bool = True) -> list[str]:
        """Why this stage must run; empty if it is up to date. `files`: look at its files, too."""
        manifest = self.manifest(stage.name)
        if manifest is None:
            return ["not finished"] if self.stage(stage.name).exists() else ["not run yet"]
        reasons = differences(manifest["config"], made_from(config, stage, self.stage(stage.name)))
        for name in inputs_of(config, stage):
            current = self.manifest(name)
            if name not in manifest["inputs"]:
                reasons.append(f"input {name} is new")
            elif current is None or manifest["inputs"][name] != current["hash"]:
                reasons.append(f"input {name} changed")
        if files and not reasons:
            try:
                self._check_outputs(stage.name, manifest, reader=stage.name)
            except UserError as error:
                reasons.append(str(error))
        return reasons

    def is_of_these_inputs(self, name: str) -> bool:
        """Whether a stage is finished, and none of its inputs has been made anew since."""
        manifest = self.manifest(name)
        return manifest is not None and not self._changed_inputs(manifest)

    def _changed_inputs(self, manifest: Manifest) -> list[str]:
        found = {name: self.manifest(name) for name in manifest["inputs"]}
        return [name for name, now in found.items() if now is not None and now["hash"] != manifest["inputs"][name]]

    def usable(self, config: PipelineConfig, stage: Stage) -> Manifest:
        """The manifest of a stage that is finished for this config, whichever version of Smalti made it.

        Its inputs need not be there any more, but none may have been made anew since.

        Raises:
            UserError: it is not finished, or it is what another config or other inputs made.
        """
        manifest = self.manifest(stage.name)
        if manifest is None:
            raise UserError(
                f"{self.path}: the stage {stage.name} has not finished training: run `smalti run` to its end first"
            )
        # A key that only one of the two versions knows makes no difference.
        reasons = [
            reason
            for reason in differences(manifest["config"], made_from(config, stage, self.stage(stage.name)))
            if "(absent)" not in reason
        ]
        reasons += [f"input {name} changed" for name in self._changed_inputs(manifest)]
        if reasons:
            raise UserError(
                f"{self.path}: the stage {stage.name} is not finished for the run's config ({'; '.join(reasons[:4])}):"
                f" run `smalti run {self.path}` to its end first, or with the config that made it"
            )
        return manifest

    def outside_changes(self, config: PipelineConfig, stage: Stage) -> list[str]:
        """Why a finished stage must run again though nothing of the run changed: what it reads from outside did.

        Apart from `stale_reasons`, since it may take a while, and a source that grows must not stop what runs already.
        """
        manifest = self.manifest(stage.name)
        return changes(stage.name, config, manifest.get("outside")) if manifest is not None else []

    def stale_inputs(self, config: PipelineConfig, stage: Stage, files: bool = True) -> list[str]:
        """Why inputs of this stage, direct or not, must run first; empty if all are up to date.

        `files`: look at those of the direct inputs; nobody reads the others', of which hashes tell enough.
        """
        reasons: list[str] = []
        for name in inputs_of(config, stage):
            upstream = stage_named(name)
            own = [f"{name}: {reason}" for reason in self.stale_reasons(config, upstream, files)]
            reasons += self.stale_inputs(config, upstream, files=False) or own
        return list(dict.fromkeys(reasons))

    def begin(
        self, config: PipelineConfig, stage: Stage, identity: dict[str, object] | None = None, amend: bool = False
    ) -> bool:
        """Make the stage directory ready; False if the stage is up to date.

        A directory of the same identity is continued, and so is a training of which only that changed which may
        (`going_on.py`); one of another identity is moved to `superseded/`.
        `identity`: as `identity` returned it, which otherwise is asked.

        Raises:
            UserError: what changed in the middle of a training needs `amend`.
        """
        if not self._go_on(stage, identity := identity or self.identity(config, stage), amend):
            self._put_in_place(stage, identity)
        if not self.stale_reasons(config, stage) and not self.outside_changes(config, stage):
            return False
        self._write_start(config, stage, identity)
        return True

    def begin_task(
        self, config: PipelineConfig, stage: Stage, task: tuple[int, int], identity: dict[str, object]
    ) -> bool:
        """Like `begin` for one of several array tasks, whose work stays. Hold a lock: it looks at no input's files."""
        directory = self.stage(stage.name)
        is_new = not directory.exists() or recorded_identity(directory) != identity
        if is_new:
            self._put_in_place(stage, identity)
        if changed := self.outside_changes(config, stage):  # since it was finished
            shutil.rmtree(directory / "tasks", ignore_errors=True)
        if changed or (is_new and self.manifest(stage.name) is None):
            self._write_start(config, stage, identity)
        return not (self.task_marker(stage.name, task).exists() or self.manifest(stage.name))

    def go_on(self, config: PipelineConfig, stage: Stage, amend: bool, check_only: bool = False) -> None:
        """What `begin` does with a training of which only that changed which may; nothing while inputs are stale.

        Raises:
            UserError: as `begin` would, also where `init_from` leads nowhere.
        """
        made_from(config, stage, self.stage(stage.name))
        if stage.trains and self.stage(stage.name).exists() and not self.stale_inputs(config, stage, files=False):
            self._go_on(stage, self.identity(config, stage, files=False), amend, check_only)

    def _go_on(self, stage: Stage, identity: dict[str, object], amend: bool, check_only: bool = False) -> bool:
        """Whether a training resumes though its identity changed; then that is recorded, unless `check_only`."""
        if self._superseded_path(stage.name, identity).is_dir():
            return False  # its config comes back
        changes = new_amendments(self.stage(stage.name), stage, identity, amend)
        if changes and not check_only:
            self._record_identity(stage, identity, changes)
            self._manifests.amend(stage.name)
            for change in changes:
                log.warning("{}: resumes after step {step} with {key}: {old} -> {new}".format(stage.name, **change))
        return bool(changes)

    def _record_identity(self, stage: Stage, identity: dict[str, object], changes: Sequence[Amendment] = ()) -> None:
        directory = self.stage(stage.name)
        amendments = [*amendments_of(directory), *changes]
        write_json(directory / "identity.json", identity | ({"amendments": amendments} if amendments else {}))

    def _put_in_place(self, stage: Stage, identity: dict[str, object]) -> None:
        """Move a directory of another identity away, and bring back one of this identity, if there is one."""
        directory = self.stage(stage.name)
        if directory.exists() and recorded_identity(directory) != identity:
            self._supersede(directory)
        superseded = self._superseded_path(stage.name, identity)
        if not directory.exists() and superseded.is_dir() and recorded_identity(superseded) == identity:
            superseded.rename(directory)
            log.info("%s: restored from %s", stage.name, superseded)

    def _write_start(self, config: PipelineConfig, stage: Stage, identity: dict[str, object]) -> None:
        directory = self.stage(stage.name)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_SUCCESS").unlink(missing_ok=True)
        remove_leftovers(directory)
        self._record_identity(stage, identity)
        record_stamp(directory, config)
        write_atomic(directory / "config.yaml", to_yaml(config.section(stage.name)))

    def finish_task(self, stage: Stage, task: tuple[int, int]) -> None:
        """Record that an array task, (index, count), has done its share."""
        write_atomic(self.task_marker(stage.name, task), "")

    def task_marker(self, name: str, task: tuple[int, int]) -> Path:
        """The file that exists when an array task has done its share."""
        index, count = task
        return self.stage(name) / "tasks" / f"{index}-of-{count}"

    def missing_tasks(self, config: PipelineConfig, stage: Stage, tasks: int) -> list[int]:
        """The array tasks that have not done their share yet. The inputs must be finished."""
        known = recorded_identity(self.stage(stage.name)) == self.identity(config, stage)
        known = known and not self.outside_changes(config, stage)
        return [i for i in range(tasks) if not (known and self.task_marker(stage.name, (i, tasks)).exists())]

    def finish(self, stage: Stage, outputs: dict[Path, str | None]) -> None:
        """Write manifest.json and then _SUCCESS. `outputs`: each path, with its SHA-256 if that is known already."""
        directory = self.stage(stage.name)
        made_from = read_json(directory / "identity.json")
        files = {str(path.relative_to(directory)): record(path, sha256) for path, sha256 in sorted(outputs.items())}
        # The hash covers what was made from what, and no times or versions: the same result has the same hash.
        manifest = {"stage": stage.name, **made_from, "outputs": files}
        manifest["hash"] = digest(manifest)
        if (stamp := recorded_stamp(directory)) is not None:
            manifest["outside"] = stamp
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
        target = self._superseded_path(directory.name, recorded_identity(directory))
        if target.exists():  # from an earlier time with the same config; the newer one is at least as far
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)
        log.info("%s: moved the outputs of another config to %s (safe to delete)", directory.name, target)


def config_of(run_directory: Path) -> Path:
    """The config file of an existing run.

    Raises:
        UserError: there is none, or it is the folder of a stage.
    """
    path = run_directory / "config.yaml"
    if os.path.isfile(run_directory / "identity.json"):
        raise UserError(f"expected a run directory, found a stage of one, {run_directory}: give {run_directory.parent}")
    if not os.path.isfile(path):  # unlike Path's, False for a name that is too long
        raise UserError(f"expected a run directory, found no config.yaml in {run_directory}: give runs/<name>")
    return path


@contextmanager
def writing_in(run_directory: Path) -> Iterator[None]:
    """Raises UserError where the run directory cannot be made or written."""
    try:
        yield
    except OSError as error:
        raise _unusable(run_directory, error) from error


def _is_before_a_run(directory: Path) -> bool:
    return all(path.name in _BEFORE_A_RUN for path in directory.iterdir())


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"expected a run directory that can be made and written at {path}, found: {error.strerror or error}:"
        f" set name=… or runs=…"
    )


def _take(outputs: set[str], old: str, new: str) -> None:
    """Outputs are replaced and never changed, so that two runs can share them; what else lies there is copied."""
    if {old, os.path.dirname(old)} & outputs:
        try:
            os.link(old, new)
            return
        except OSError:  # on another disk
            pass
    shutil.copy2(old, new)
