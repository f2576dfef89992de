"""A stage around its own work: inputs, locks, tracking, manifest. Its process is `cli/stage.py`."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json, write_atomic, write_json
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.lock import Lock, refuse_if_held
from pipeline.orchestration.at_work import refuse_other_config
from pipeline.orchestration.environment import RUNNER_VARIABLE, SUBMITTED_VARIABLE
from pipeline.orchestration.going_on import shares_of_training
from pipeline.orchestration.graph import Stage, inputs_of, stages_of
from pipeline.orchestration.keep_finished import keep_finished
from pipeline.orchestration.mlflow_mirror import Mirror, is_left_to_others
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.tracking import Tracker

log = logging.getLogger(__name__)

_ARTIFACT_LIMIT_BYTES = 50_000_000
_OPENING_S = 10.0  # seconds that a stage waits for another one that opens the run
T = TypeVar("T")


class StageRun:
    """What a stage's own work gets: config, directories, tracker, and where to name its outputs."""

    def __init__(
        self,
        config: PipelineConfig,
        stage: Stage,
        runs: RunDirectory,
        tracker: Tracker,
        array_task: tuple[int, int] | None = None,
    ) -> None:
        self.config = config
        self.stage = stage
        self.name = stage.name
        self.seed = config.seed
        self.directory = runs.stage(stage.name)
        self.tracker = tracker
        self.inputs = inputs_of(config, stage)
        self.array_task = array_task  # (index, count): does its share and leaves the rest to the join
        self.outputs: dict[Path, str | None] = {}
        self._artifacts: list[Path] = []
        self._runs = runs
        self._pieces, self._pieces_path = 0, None
        if array_task:
            self._pieces_path = runs.task_marker(stage.name, array_task).with_suffix(".pieces")
            with suppress(OSError, ValueError):
                self._pieces = int(self._pieces_path.read_text())

    def input(self, name: str) -> Path:
        """The directory of a finished input stage, or of one that this stage looks at.

        Raises:
            KeyError: the graph does not list `name` among this stage's inputs.
        """
        if name not in self.stage.inputs + self.stage.looks_at:
            raise KeyError(f"{self.name} does not list {name} among its inputs in pipeline/orchestration/graph.py")
        return self._runs.stage(name)

    @property
    def training_seed(self) -> int:
        """Of this stage's training: its own (`training.seed`), or the run's."""
        training = self.config.training(self.stage.section)
        return self.config.seed if training is None or training.seed is None else training.seed

    @property
    def source_shares(self) -> list[tuple[int, list[int]]]:
        """From which sample of this training on how many of each 1,000 come from each of prepare.sources.

        Of one source, empty. What changed in the middle of the training, its amendments say.
        """
        return shares_of_training(self.config, self.stage, self.directory)

    def my_share(self, items: Sequence[T]) -> Sequence[T]:
        """This array task's part of the stage's independent pieces of work; all of them outside an array."""
        if self.array_task is None:
            return items
        index, count = self.array_task
        return items[index::count]

    def pieces_done(self, count: int) -> None:
        """Tell how many pieces of its share an array task has done, those that it found done included.

        By that a job's supervisor knows a task that gets on, life by life, from one that does not.
        """
        if self._pieces_path and count > self._pieces:
            write_atomic(self._pieces_path, f"{count}\n")
            self._pieces = count

    def add_output(self, path: Path | str, sha256: str | None = None, artifact: bool = False) -> None:
        """Add a file of the result to the manifest.

        Args:
            sha256: its hex digest, if it is known already.
            artifact: whether MLflow gets a copy, if it has no more than 50 MB. Not for what grows with the data.
        """
        full = Path(path) if Path(path).is_relative_to(self.directory) else self.directory / path
        self.outputs[full] = sha256
        if artifact:
            self._artifacts.append(full)

    def finish(self) -> None:
        """Write the manifest and _SUCCESS; outputs that were added as such become artifacts of the tracking."""
        if self.array_task is not None:
            self._runs.finish_task(self.stage, self.array_task)
        if not self.tracker.active:
            return
        self._runs.finish(self.stage, self.outputs)
        small = [path for path in sorted(self._artifacts) if path.stat().st_size <= _ARTIFACT_LIMIT_BYTES]
        for path in (self.directory / "config.yaml", self.directory / "manifest.json", *small):
            folder = path.relative_to(self.directory).parent  # samples/00.png and reconstructions/00.png are two
            self.tracker.artifact(path, str(folder) if folder.parts else None)


def execute(
    stage: Stage,
    config: PipelineConfig,
    source: str,
    array_task: tuple[int, int] | None,
    body: Callable[[StageRun], None],
    take_over: bool = False,
    amend: bool = False,
) -> None:
    """Run the stage `body` in its run directory, from locks to manifest; nothing if the stage is up to date.

    Every rank of a stage that trains calls this. `source` is the name of the config file. `amend`: what changed in the
    middle of a training is wanted.

    Raises:
        UserError: the stage cannot start, or `body` found a mistake; on every rank.
        StoppedOnRequest: a signal came, and the stage has saved.
    """
    from pipeline.core import distributed

    runs = RunDirectory(config.run_directory)
    with ExitStack() as held:
        # Rank 0 begins; its outcome, error included, is every rank's.
        outcome: bool | UserError = False
        if distributed.is_main():
            try:
                outcome = _begin(stage, config, source, runs, array_task, held, take_over, amend)
            except UserError as error:
                outcome = error
        outcome = distributed.broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        if not outcome:
            log.info("%s: up to date", stage.name)
            if distributed.is_main():
                _confirm(stage, runs, array_task)
            return
        if stage.trains:
            import torch

            from pipeline.orchestration.node_files import refuse_nodes_that_see_other_files

            refuse_nodes_that_see_other_files(config, stage, runs)
            torch.manual_seed(config.seed)
        tracker = _make_tracker(stage, config, runs, active=distributed.is_main() and array_task is None)
        _run_tracked(StageRun(config, stage, runs, tracker, array_task), body)


def _begin(
    stage: Stage,
    config: PipelineConfig,
    source: str,
    runs: RunDirectory,
    array_task: tuple[int, int] | None,
    held: ExitStack,
    take_over: bool,
    amend: bool,
) -> bool:
    """Take the stage's lock into `held`, check its inputs and make its directory ready; False if it is up to date."""
    if stage not in stages_of(config):
        raise UserError(f"{stage.name} is not part of this pipeline: set {stage.section}.enabled=true")
    if amend and runs.path.exists():
        keep_finished(runs, config)
    # The tasks of an array are many, and find a lock taken now and then: they wait, and none is refused for it.
    patience_s = 0.0 if array_task is None else math.inf
    checked = False
    if not (os.environ.get(RUNNER_VARIABLE) or os.environ.get(SUBMITTED_VARIABLE)):  # these have opened the run already
        runs.check(source, take_over)
        if config.branched_from is None:  # a refused command changes nothing
            _refuse_stale_inputs(stage, config, runs)
            runs.go_on(config, stage, amend, check_only=True)
            checked = True
        refuse_other_config(runs.path, config, patience_s)
        with runs.lock_run(wait_s=max(patience_s, _OPENING_S)):  # those started side by side open it one by one
            runs.open(config, source)
    # The tasks of an array write side by side, but not beside a process that does the whole stage.
    others = (
        [runs.lock(stage.name)] if array_task else sorted(runs.lock(stage.name).parent.glob(f"{stage.name}.task-*"))
    )
    name = f"{stage.name}.task-{array_task[0]}-of-{array_task[1]}" if array_task else stage.name
    held.enter_context(Lock(runs.lock(name), f"stage {name}", patience_s))
    refuse_if_held(others, f"stage {stage.name}", patience_s)
    _refuse_stale_inputs(stage, config, runs, files=not checked)
    _refuse_empty_splits(stage, runs)
    identity = runs.identity(config, stage, files=False)
    if array_task is None:
        return runs.begin(config, stage, identity, amend)
    with Lock(runs.lock(f"{stage.name}.begin"), f"the start of stage {stage.name}", patience_s):
        return runs.begin_task(config, stage, array_task, identity)


def _confirm(stage: Stage, runs: RunDirectory, array_task: tuple[int, int] | None) -> None:
    """Give the record of finished work today's time: a job's supervisor counts no other one as found up to date."""
    if array_task is None:
        os.utime(runs.stage(stage.name) / "_SUCCESS")
    else:
        runs.finish_task(stage, array_task)


def _refuse_stale_inputs(stage: Stage, config: PipelineConfig, runs: RunDirectory, files: bool = True) -> None:
    if stale := runs.stale_inputs(config, stage, files):
        raise UserError(
            f"{stage.name}: its inputs are out of date ({'; '.join(stale)}):"
            f" run those stages first, or everything with `smalti run`"
        )


def _refuse_empty_splits(stage: Stage, runs: RunDirectory) -> None:
    """Told before the first training: the last one would stop at it, hours later."""
    index = runs.stage("prepare") / "index.json"
    if "prepare" not in stage.inputs or not index.is_file():
        return
    counts = {name: split["samples"] for name, split in read_json(index)["splits"].items()}
    if empty := [name for name, samples in counts.items() if not samples]:
        raise UserError(
            f"{stage.name}: expected samples in both splits of {index.parent}, found none in '{empty[0]}'"
            f" of {sum(counts.values())}: change prepare.validation_fraction, or add samples"
        )


def _run_tracked(run: StageRun, body: Callable[[StageRun], None]) -> None:
    """Run the stage's own work and record its time; however it ends, the tracker records how."""
    started = time.monotonic()
    run.tracker.start()
    try:
        body(run)
    except StoppedOnRequest:
        _add_wall_time(run, time.monotonic() - started)
        run.tracker.close("KILLED")
        raise
    except BaseException:
        run.tracker.close("FAILED")
        raise
    _add_wall_time(run, time.monotonic() - started)
    run.finish()
    run.tracker.close("FINISHED")


def _add_wall_time(run: StageRun, seconds: float) -> None:
    """Add to the wall time of the stage over all restarts. It stays out of the manifest, whose hash has no times."""
    if not run.tracker.active:
        return
    path = run.directory / "timing.json"
    before = read_json(path)["wall_time_s"] if path.exists() else 0.0
    write_json(path, {"wall_time_s": before + seconds})


def _make_tracker(stage: Stage, config: PipelineConfig, runs: RunDirectory, active: bool) -> Tracker:
    tracking = config.tracking
    mirror = None
    if active and tracking.enabled:
        if is_left_to_others(config, stage.name):
            log.info("MLflow's database is filled by the last stage, and by `smalti ui` while jobs work")
        else:
            mirror = Mirror(config, stage.name)
    return Tracker(runs.stage(stage.name), mirror, every_s=tracking.system_metrics_every_s, active=active)
