"""What every stage does around its own work: config, inputs, lock, tracking, stopping, manifest.

    python -m stages.prepare --config configs/openmoji.yaml prepare.image_size=64

The contract of a stage process:
    exit 0 with `_SUCCESS`       finished, now or before
    exit 0 without `_SUCCESS`    stopped on request; run it again and it goes on
    exit 2                       a user's mistake, told in one line
    anything else                a crash; the traceback is on stderr
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, TypeVar

import click

from pipeline import stop
from pipeline.errors import StoppedOnRequest, UserError
from pipeline.files import read_json, write_json
from pipeline.graph import STAGES, PipelineConfig, Stage, load_pipeline, stage_identity, stage_named, stages_of
from pipeline.lock import Lock, refuse_if_held
from pipeline.runs import RunDirectory, source_name
from pipeline.tracking import Mirror, Tracker

log = logging.getLogger(__name__)

RUNNER_VARIABLE = "SMALTI_RUNNER_PID"
SUBMITTED_VARIABLE = "SMALTI_SUBMITTED"  # set in Slurm's jobs, whose submitter has recorded config and code
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
            raise KeyError(f"{self.name} does not list {name} among its inputs in pipeline/graph.py")
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


def run_stage(name: str, body: Callable[[StageRun], None]) -> None:
    """Entry point of `python -m stages.<name>`. Never returns."""
    from pipeline import distributed

    stop.install()
    _die_with_runner()
    stage = stage_named(name)
    try:
        config, source, array_task = _arguments(stage)
        _configure_logging(config.run_directory / "logs" / f"{name}.log")
        if stage.trains:
            distributed.init()
        _run(stage, config, source, array_task, body)
        status = 0
    except StoppedOnRequest as request:
        log.info("%s; run the same command again to go on", request)
        status = 0
    except UserError as error:
        if distributed.is_main():
            log.error("error: %s", error)
        status = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            log.exception("%s crashed", name)
            status = 1
        else:
            log.error("error: no space left (%s): free some, then run the same command again, it goes on", error)
            status = 2
    except SystemExit as leaving:  # --help
        status = int(leaving.code or 0)
    except BaseException:
        log.exception("%s crashed", name)
        status = 1
    stop.ignore()
    distributed.leave(status)


def _run(
    stage: Stage,
    config: PipelineConfig,
    source: str,
    array_task: tuple[int, int] | None,
    body: Callable[[StageRun], None],
) -> None:
    from pipeline import distributed

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


def _arguments(stage: Stage) -> tuple[PipelineConfig, str, tuple[int, int] | None]:
    """The resolved config of the command line, the name of the config file it came from, and the array task."""
    parsed: dict[str, tuple[str, str | None, tuple[str, ...]]] = {}

    @click.command(help=f"Run the stage {stage.name} of a pipeline.")
    @click.option("--config", "path", required=True, help="pipeline config (YAML), or a run's config.yaml")
    @click.option("--array-task", metavar="I/N", help="do the share of task I (from 0) of N; then run the stage itself")
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    def command(path: str, array_task: str | None, overrides: tuple[str, ...]) -> None:
        parsed["it"] = (path, array_task, overrides)

    try:
        if command.main(prog_name=f"python -m {stage.module}", standalone_mode=False) == 0 and not parsed:
            sys.exit(0)  # --help
    except click.ClickException as error:
        raise UserError(error.format_message()) from error
    path, array_task, overrides = parsed["it"]
    return load_pipeline(path, overrides), source_name(path), _parsed_task(stage, array_task)


def _parsed_task(stage: Stage, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    which, _, of = text.partition("/")
    if not stage.shards or not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise UserError(
            f"--array-task {text}: expected I/N with 0 <= I < N, of a stage that splits"
            f" ({', '.join(stage.name for stage in STAGES if stage.shards)}), found it for {stage.name}"
        )
    return int(which), int(of)


def run_stage_here(name: str, arguments: list[str]) -> NoReturn:
    """`python -m stages.<name> …` in this process. Ends it."""
    sys.argv = [name, *arguments]
    runpy.run_module(stage_named(name).module, run_name="__main__", alter_sys=True)
    raise AssertionError("a stage ends its process")


def _configure_logging(path: Path) -> None:
    """Messages go to stderr, and from rank 0 also to logs/<stage>.log, where they stay."""
    main = int(os.environ.get("RANK", 0)) == 0
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if main and path.parent.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
        handlers.append(logging.FileHandler(path))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if main else logging.ERROR, handlers=handlers)
    for noisy in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _die_with_runner() -> None:
    """A stage started by the local runner ends when the runner is killed, so that a new one can take over at once."""
    runner = os.environ.get(RUNNER_VARIABLE)
    if runner and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if not os.path.exists(f"/proc/{runner}"):
            os._exit(1)
