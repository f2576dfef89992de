"""What every stage does around its own work: inputs, lock, tracking, manifest. `cli/stage.py` is its process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.lock import Lock, refuse_if_held
from pipeline.orchestration.environment import RUNNER_VARIABLE, SUBMITTED_VARIABLE
from pipeline.orchestration.graph import STAGES, Stage, stage_identity, stages_of
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.tracking import Mirror, Tracker

log = logging.getLogger(__name__)

_ARTIFACT_LIMIT_BYTES = 50_000_000
T = TypeVar("T")


class StageRun:
    """One stage's view of its run: config, directories, tracker, outputs."""

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
        self.array_task = array_task  # (which, of how many): does its share and leaves the rest to the join
        self.outputs: dict[Path, str | None] = {}
        self._runs = runs

    def input(self, name: str) -> Path:
        """The directory of a finished input stage."""
        if name not in self.stage.inputs:
            raise KeyError(f"{self.name} does not list {name} among its inputs in pipeline/orchestration/graph.py")
        return self._runs.stage(name)

    def my_share(self, items: Sequence[T]) -> Sequence[T]:
        """This array task's part of the stage's independent pieces of work; all of them outside an array."""
        if self.array_task is None:
            return items
        which, of = self.array_task
        return items[which::of]

    def add_output(self, path: Path | str, sha256: str | None = None) -> None:
        """Name a file of the result; it goes into the manifest. `sha256` if it is known already."""
        full = Path(path) if Path(path).is_relative_to(self.directory) else self.directory / path
        self.outputs[full] = sha256

    def finish(self) -> None:
        """Write the manifest and _SUCCESS; what is small becomes an artifact of the tracking."""
        if self.array_task is not None:
            self._runs.finish_task(self.stage, self.array_task)
        if not self.tracker.active:
            return
        self._runs.finish(self.stage, self.outputs)
        small = [p for p in sorted(self.outputs) if p.suffix != ".tar" and p.stat().st_size <= _ARTIFACT_LIMIT_BYTES]
        for path in (self.directory / "config.yaml", self.directory / "manifest.json", *small):
            folder = path.relative_to(self.directory).parent  # samples/00.png and reconstructions/00.png are two
            self.tracker.artifact(path, str(folder) if folder.parts else None)


def execute(
    stage: Stage,
    config: PipelineConfig,
    source: str,
    array_task: tuple[int, int] | None,
    body: Callable[[StageRun], None],
) -> None:
    from pipeline.core import distributed

    runs = RunDirectory(config.run_directory)
    with ExitStack() as held:
        # Rank 0 prepares the ground; its outcome, error included, is every rank's.
        outcome: bool | UserError = False
        if distributed.is_main():
            try:
                outcome = _prepare_ground(stage, config, source, runs, array_task, held)
            except UserError as error:
                outcome = error
        outcome = distributed.broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        if not outcome:
            log.info("%s: up to date", stage.name)
            return
        if stage.trains:
            import torch

            torch.manual_seed(config.seed)
        tracker = _tracker(stage, config, runs, active=distributed.is_main() and array_task is None)
        _measured(StageRun(config, stage, runs, tracker, array_task), body)


def _prepare_ground(
    stage: Stage,
    config: PipelineConfig,
    source: str,
    runs: RunDirectory,
    array_task: tuple[int, int] | None,
    held: ExitStack,
) -> bool:
    if stage not in stages_of(config):
        raise UserError(f"{stage.name} is not part of this pipeline: set {stage.name.replace('-', '_')}.enabled=true")
    if not (os.environ.get(RUNNER_VARIABLE) or os.environ.get(SUBMITTED_VARIABLE)):  # they have opened the run
        runs.check(source)
        with Lock(runs.lock("run"), f"the run in {runs.path}"):
            runs.open(config, source)
    # The tasks of an array write side by side, but not beside a process that does the whole stage.
    others = (
        [runs.lock(stage.name)] if array_task else sorted(runs.lock(stage.name).parent.glob(f"{stage.name}.task-*"))
    )
    name = f"{stage.name}.task-{array_task[0]}-of-{array_task[1]}" if array_task else stage.name
    held.enter_context(Lock(runs.lock(name), f"stage {name}"))
    for other in others:
        refuse_if_held(other, f"stage {other.stem}")
    if stale := runs.stale_inputs(config, stage):
        raise UserError(
            f"{stage.name}: its inputs are not what this config makes ({'; '.join(stale)}):"
            f" run those stages first, or everything with `smalti run`"
        )
    if array_task is None:
        return runs.begin(config, stage)
    with Lock(runs.lock(f"{stage.name}.begin"), f"the start of stage {stage.name}", wait_s=120):
        return runs.begin_task(config, stage, array_task)


def _measured(run: StageRun, body: Callable[[StageRun], None]) -> None:
    """Run the stage's own work; whatever happens, the tracker learns how it ended."""
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
    """Wall time is summed over the lives of a stage, and kept out of the manifest, whose hash has no times."""
    if not run.tracker.active:
        return
    path = run.directory / "timing.json"
    before = read_json(path)["wall_time_s"] if path.exists() else 0.0
    write_json(path, {"wall_time_s": before + seconds})


def _tracker(stage: Stage, config: PipelineConfig, runs: RunDirectory, active: bool) -> Tracker:
    tracking = config.tracking
    mirror = None
    if active and tracking.enabled:
        mirror = Mirror(
            tracking,
            runs.path,
            config.name,
            stage.name,
            parameters=stage_identity(config, stage.name),
            last_stage=stage is STAGES[-1],
        )
    return Tracker(runs.stage(stage.name), mirror, every_s=tracking.system_metrics_every_s, active=active)
