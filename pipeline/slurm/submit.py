"""The stage graph as Slurm jobs, chained by `afterok`.

    runs/<name>/slurm/   <stage>.sbatch  the job files           cluster.yaml  the cluster file, resolved
                         jobs.json       what was submitted      <stage>.lives.json: how it went, by the supervisor
                         dry-run/        what a dry run would have written here; it changes nothing else
    runs/<name>/code/src/                this run's copy of the code

Submitting again is safe: what is finished is skipped, what is queued or running is not doubled, and the
new jobs wait for it. Slurm itself says which jobs are active (their comment names the run), never a file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from pipeline.config.base import differences, to_yaml
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import UserError
from pipeline.orchestration.at_work import refuse_other_config
from pipeline.orchestration.code_snapshot import copy_packages
from pipeline.orchestration.graph import (
    STAGES,
    Stage,
    check_before_start,
    chosen_stages,
    inputs_of,
    stage_identity,
    stage_named,
    stages_of,
)
from pipeline.orchestration.run_directory import RunDirectory, writing_in
from pipeline.slurm import scheduler
from pipeline.slurm.cluster import ClusterConfig
from pipeline.slurm.render import JobFile, render, script_path
from pipeline.slurm.scheduler import Job
from pipeline.slurm.supervisor.record import read_record, record_paths, write_record
from pipeline.slurm.table import format_table

_ENDING_PATIENCE_S = 60.0


@dataclass
class Planned:
    """A job to submit, or why a stage needs none."""

    stage: Stage
    file: JobFile | None = None  # None: nothing to submit
    array: str | None = None
    after: list[Planned] = field(default_factory=list)
    id: int | None = None
    tasks: tuple[str, ...] = ()  # of an active array: those that still come to their end, "12_5"
    why: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What Slurm waits for."""
        return self.tasks or (() if self.id is None else (str(self.id),))


def submit_pipeline(
    config: PipelineConfig,
    source: str,
    cluster: ClusterConfig,
    *,
    first: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    take_over: bool = False,
    amend: bool = False,
) -> None:
    """Submit every stage that is not finished; `first`: that stage and what comes after it; `only`: that one.

    `amend`: what changed in the middle of a training is wanted.

    Raises:
        UserError: the cluster file does not fit, jobs of another config are active, or Slurm refuses.
    """
    runs = RunDirectory(config.run_directory.resolve())
    chosen = {stage.name for stage in chosen_stages(config, first, only)}
    check_before_start(
        config, lambda stage: cluster.resources(stage).world_size, where=" (nodes × tasks in the cluster file)"
    )
    runs.check(source, take_over)
    for stage in stages_of(config):
        runs.go_on(config, stage, amend, check_only=True)
    if dry_run:
        jobs = _active_jobs(runs.path, dry_run)
        if jobs:
            _check_same_config(runs, config, jobs)
        plan = make_plan(config, runs, cluster, jobs, chosen)
        folder = runs.path / "slurm" / "dry-run"
        shutil.rmtree(folder, ignore_errors=True)
        with writing_in(runs.path):
            write_atomic(folder / "config.yaml", to_yaml(config))
            _write_files(plan, cluster, runs, folder)
        click.echo(_table(plan, runs.path, folder))
        return
    with runs.lock_run():
        jobs = _active_jobs(runs.path, dry_run)
        if jobs:
            _check_same_config(runs, config, jobs)
            click.echo("jobs of this run are active: their config and code stay as they are", err=True)
        else:
            refuse_other_config(runs.path, config)
            runs.open(config, source)
            for stage in stages_of(config):
                runs.go_on(config, stage, amend)
            copy_packages(runs.path / "code" / "src")
        plan = make_plan(config, runs, cluster, jobs, chosen)
        _write_files(plan, cluster, runs, runs.path / "slurm")
        _submit(plan, runs)
    click.echo(_table(plan, runs.path, runs.path / "slurm"))


def make_plan(
    config: PipelineConfig, runs: RunDirectory, cluster: ClusterConfig, jobs: list[Job], chosen: set[str]
) -> list[Planned]:
    """Every stage in the order of the graph: the jobs to submit for it, or why there are none."""
    plan: list[Planned] = []
    coming: dict[str, Planned] = {}  # the last job of each stage that is queued or will be
    for stage in stages_of(config):
        mine = [job for job in jobs if job.script == stage.name]
        if mine:
            last = Planned(stage, id=mine[-1].id, why=mine[-1].state.lower())
            plan.append(last)
            coming[stage.name] = last
            continue
        waits_for = [coming[name] for name in inputs_of(config, stage) if name in coming]
        reasons = [] if waits_for else runs.stale_reasons(config, stage) or runs.outside_changes(config, stage)
        if not waits_for and not reasons:
            plan.append(Planned(stage, why="finished"))
        elif stage.name not in chosen:
            plan.append(Planned(stage, why="left out"))
        else:
            _check_inputs(config, runs, stage, set(coming))
            added = _jobs_of_stage(config, runs, cluster, jobs, stage, waits_for)
            plan += added
            coming[stage.name] = added[-1]
    return plan


def _jobs_of_stage(
    config: PipelineConfig,
    runs: RunDirectory,
    cluster: ClusterConfig,
    jobs: list[Job],
    stage: Stage,
    waits_for: list[Planned],
) -> list[Planned]:
    """One job; or an array and its join: the stage itself, which finds all shards done, checks them and finishes."""
    resources = cluster.resources(stage)
    join = Planned(stage, JobFile(stage, resources), after=waits_for)
    if not resources.array:
        return [join]
    active = [job for job in jobs if job.script == f"{stage.name}.tasks"]
    missing = list(range(resources.array)) if waits_for else runs.missing_tasks(config, stage, resources.array)
    missing = [task for task in missing if task not in {job.task for job in active}]
    parts = [_active_tasks(stage, [job for job in active if job.id == id]) for id in sorted({job.id for job in active})]
    if missing:
        every = missing == list(range(resources.array))
        array = f"0-{resources.array - 1}" if every else ",".join(map(str, missing))
        array += f"%{resources.array_limit}" if resources.array_limit else ""
        parts.append(Planned(stage, JobFile(stage, resources, resources.array), array, after=waits_for))
    join.after = parts or waits_for
    return [*parts, join]


def _active_tasks(stage: Stage, jobs: list[Job]) -> Planned:
    """The tasks of one array that are queued or running; others may have failed, so nothing may wait for the whole."""
    states = ", ".join(sorted({job.state.lower() for job in jobs}))
    which = ",".join(str(job.task) for job in jobs)
    return Planned(stage, array=which, id=jobs[0].id, tasks=tuple(job.name for job in jobs), why=states)


def _check_inputs(config: PipelineConfig, runs: RunDirectory, stage: Stage, coming: set[str]) -> None:
    for name in inputs_of(config, stage):
        if name not in coming and (reasons := runs.stale_reasons(config, stage_named(name))):
            raise UserError(
                f"{stage.name} needs {name}, which is neither finished nor queued ({'; '.join(reasons[:3])}):"
                f" submit --from {name}, or everything"
            )


def _active_jobs(run_directory: Path, dry_run: bool) -> list[Job]:
    """This run's active jobs. Waits for those that are just ending, e.g. after a cancel: none can depend on them.

    Raises:
        UserError: some do not come to their end, or Slurm does not answer.
    """
    deadline = time.monotonic() + _ENDING_PATIENCE_S
    try:
        jobs = scheduler.jobs_of(run_directory)
        while any(job.ending for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.5)
            jobs = scheduler.jobs_of(run_directory)
    except UserError as error:
        if not dry_run:
            raise
        click.echo(f"could not ask Slurm for active jobs: {error}", err=True)
        return []
    if not dry_run and (ending := sorted({job.id for job in jobs if job.ending})):
        raise UserError(
            f"waited {_ENDING_PATIENCE_S:.0f} s for jobs {', '.join(map(str, ending))} of {run_directory} to end, and"
            " they are still ending: what waits for a cancelled one never starts; resubmit once they have"
        )
    return [job for job in jobs if job.active]


def _check_same_config(runs: RunDirectory, config: PipelineConfig, jobs: list[Job]) -> None:
    known = load_pipeline(runs.path / "config.yaml")
    changes = [
        change
        for stage in STAGES
        for change in differences(stage_identity(known, stage.name), stage_identity(config, stage.name))
    ]
    if changes:
        ids = sorted({job.id for job in jobs})
        raise UserError(
            f"jobs {', '.join(map(str, ids))} of {runs.path} are active with another config"
            f" ({'; '.join(list(dict.fromkeys(changes))[:4])}): wait, or `smalti cancel {runs.path}`, or set name=…"
        )


def _write_files(plan: list[Planned], cluster: ClusterConfig, runs: RunDirectory, folder: Path) -> None:
    (runs.path / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "cluster.yaml", to_yaml(cluster))
    for planned in plan:
        if planned.file:
            text = render(planned.file, cluster, runs.path, runs.path / "code" / "src", Path.cwd())
            write_atomic(folder / script_path(planned.file, runs.path).name, text)


def _submit(plan: list[Planned], runs: RunDirectory) -> None:
    for planned in plan:
        if planned.file is None:
            continue
        for path in record_paths(runs.path, planned.stage.name):
            if (record := read_record(path)).failure:
                record.failure = ""
                write_record(path, record)
        after = [name for other in planned.after for name in other.names]
        planned.id = scheduler.submit(script_path(planned.file, runs.path), after, planned.array)
        planned.why = "submitted"
        # At once, so that nothing that Slurm has is forgotten when the next sbatch fails.
        scheduler.record_job(runs.path, planned.file.name, planned.id)


def _table(plan: list[Planned], run_directory: Path, folder: Path) -> str:
    header = ["STAGE", "JOB", "AFTER", "ARRAY", "NODES×TASKS", "GPUS", "TIME", "WHAT"]
    name: Callable[[Planned], str] = lambda p: str(p.id or (p.file.name if p.file else p.stage.name))  # noqa: E731
    rows = []
    for planned in plan:
        after = ",".join(name(other) for other in planned.after if planned.file)
        size, gpus, time, what = "", "", "", planned.why
        if planned.file:
            resources = planned.file.resources
            size = f"{resources.nodes}×{resources.ntasks_per_node}"
            gpus, time = str(resources.gpus or ""), resources.time or ""
            script = (folder / script_path(planned.file, run_directory).name).relative_to(run_directory)
            what = f"{what or 'written'}: {script}"
        label = planned.stage.name + (" (tasks)" if planned.array else "")
        rows.append([label, str(planned.id or ""), after, planned.array or "", size, gpus, time, what])
    return format_table(header, rows)
