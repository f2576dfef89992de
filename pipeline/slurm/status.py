"""The status of a run: Slurm's queue and accounting joined with the run directory.

In this order: squeue (accurate, but forgets), sacct (remembers, lags, and many sites have none), the run
directory (`_SUCCESS`, locks, what the supervisors of jobs record). Either of the first two may be missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.lock import owner_of
from pipeline.core.metric_names import CLOCK_METRICS, LOOP_METRICS
from pipeline.orchestration.graph import Stage, inputs_of, stages_of
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.slurm import scheduler
from pipeline.slurm.scheduler import Job
from pipeline.slurm.supervisor.record import read_record, record_paths
from pipeline.slurm.table import format_table

_TAIL_BYTES = 65_536
_LAST_LINES = 5
_NOT_METRICS = {"step", "time", *LOOP_METRICS, *CLOCK_METRICS}
_WAITING = ("Dependency", "Priority", "Resources", "BeginTime")


@dataclass
class StageStatus:
    """One line of the table. Empty or None: not known, or does not apply."""

    stage: str
    # FINISHED; STALE (finished, but for another config or from other inputs: `smalti run` does it again);
    # or Slurm's own word, or LOST (Slurm knows nothing of it, and it is not finished), or UNKNOWN (no answer)
    state: str = "NOT RUN"
    job: str = ""
    reason: str = ""
    nodes: str = ""
    tasks_done: str = ""  # of an array, "3/8"
    step: int | None = None
    steps: int | None = None
    rate: str = ""
    metric: str | None = None  # its name
    value: float | None = None  # of the metric
    restarts: int = 0
    job_time_left: str = ""  # until its time limit, by squeue
    stage_time_left_s: float | None = None  # by the rate
    failure: str = ""  # of a failed job: which rank failed, and its last lines


def run_status(runs: RunDirectory, files: bool = True) -> tuple[list[StageStatus], str | None]:
    """The status of each stage, and why Slurm could not be asked, if so.

    `files`: look at each file of finished stages, and at what they read from outside; with many it takes a while.
    """
    config = load_pipeline(config_of(runs.path))
    recorded = scheduler.recorded_jobs(runs.path)
    problem = None
    jobs: list[Job] = []
    if recorded:
        try:
            jobs = scheduler.jobs_of(runs.path)
        except UserError as error:
            problem = str(error)
    known = {job.id for job in jobs}
    ended = scheduler.ended_states([number for number in recorded.values() if number not in known]) if recorded else {}
    listed = [_stage_status(stage, config, runs, jobs, recorded, ended, files) for stage in stages_of(config)]
    _mark_stale(listed, config, runs, files)
    for status in listed:
        if problem and status.state == "LOST":
            status.state, status.reason = "UNKNOWN", "Slurm gives no answer"
    return listed, problem


def _stage_status(
    stage: Stage,
    config: PipelineConfig,
    runs: RunDirectory,
    jobs: list[Job],
    recorded: dict[str, int],
    ended: dict[str, str],
    files: bool,
) -> StageStatus:
    status = StageStatus(stage.name)
    _add_progress(status, stage, config, runs)
    records = [read_record(path) for path in record_paths(runs.path, stage.name)]
    status.restarts = sum(max(len(record.newest_chain()) - 1, 0) for record in records)
    status.failure = "\n".join(record.failure for record in records if record.failure)
    _add_jobs(status, stage, jobs)
    if status.state == "NOT RUN" or (
        not _is_active(status, stage, jobs) and _is_done(status, stage, config, runs, files)
    ):
        _add_what_slurm_forgot(status, stage, runs, recorded, ended)
    if status.state in ("FINISHED", "RUNNING", "PENDING"):
        status.failure = ""
    elif status.state == "FAILED" and not status.failure:
        status.failure = _last_words(runs, status)
    if status.failure:
        status.reason = status.failure.splitlines()[0].removeprefix("smalti: ").removeprefix(f"{stage.name} ")
        status.reason = status.reason.removesuffix("; its last lines:")
    return status


def _last_words(runs: RunDirectory, status: StageStatus) -> str:
    """Of a job that failed before its supervisor ran: it has left nothing but its log. Empty if there is none."""
    logs = sorted((runs.path / "logs" / "slurm").glob(f"{status.stage}-{status.job}*.log"))
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()[-_LAST_LINES:]]
    said = "\n".join(lines[-_LAST_LINES:])
    return f"smalti: {status.stage} failed before it began; its last lines:\n{said}" if status.job and said else ""


def _mark_stale(listed: list[StageStatus], config: PipelineConfig, runs: RunDirectory, files: bool) -> None:
    """Tell the stages that are finished for the run's config from those that were finished for another one."""
    stale: list[str] = []
    for status, stage in zip(listed, stages_of(config), strict=True):
        if status.state != "FINISHED":
            continue
        reasons = runs.stale_reasons(config, stage, files) or (runs.outside_changes(config, stage) if files else [])
        reasons = reasons or [f"input {name} is stale" for name in inputs_of(config, stage) if name in stale]
        if reasons:
            stale.append(stage.name)
            status.state, status.reason = "STALE", "; ".join(reasons[:3])


def _add_jobs(status: StageStatus, stage: Stage, jobs: list[Job]) -> None:
    """From squeue: the newest job of the stage; while an array is at work, the array."""
    scripts = {script: [job for job in jobs if job.script == script] for script in (stage.name, f"{stage.name}.tasks")}
    newest = {script: [job for job in found if job.id == found[-1].id] for script, found in scripts.items() if found}
    tasks = newest.get(f"{stage.name}.tasks", [])
    main = newest.get(stage.name, [])
    shown = main
    if tasks and (any(job.active for job in tasks) or any(job.state != "COMPLETED" for job in tasks) or not main):
        shown = tasks
        status.tasks_done = f"{sum(job.state == 'COMPLETED' for job in tasks)}/{len(tasks)}"
    if not shown:
        return
    order = ["RUNNING", "COMPLETING", "CONFIGURING", "PENDING"]
    # Of an array, the state of the task that says most: a failed one, else a running one.
    failed = [job for job in shown if not job.active and job.state != "COMPLETED"]
    by_state = sorted(shown, key=lambda job: order.index(job.state) if job.state in order else len(order))
    job = (failed or by_state)[0]
    waiting = job.reason in _WAITING and not job.active  # why it waited says nothing of how it ended
    status.state, status.reason, status.job = job.state, "" if waiting else job.reason, str(job.id)
    status.nodes = ",".join(dict.fromkeys(j.nodes for j in shown if j.nodes and j.active))
    status.job_time_left = job.time_left if job.state == "RUNNING" else ""


def _is_done(status: StageStatus, stage: Stage, config: PipelineConfig, runs: RunDirectory, files: bool) -> bool:
    """Whether the stage is finished, whatever its last job says: a failed one did not make what is stale."""
    manifest = runs.manifest(stage.name)
    return manifest is not None and (status.state == "COMPLETED" or not runs.stale_reasons(config, stage, files))


def _is_active(status: StageStatus, stage: Stage, jobs: list[Job]) -> bool:
    return any(job.active for job in jobs if str(job.id) == status.job)


def _add_what_slurm_forgot(
    status: StageStatus, stage: Stage, runs: RunDirectory, recorded: dict[str, int], ended: dict[str, str]
) -> None:
    numbers = [recorded[script] for script in (stage.name, f"{stage.name}.tasks") if script in recorded]
    status.job = status.job or (str(numbers[0]) if numbers else "")
    if runs.manifest(stage.name) is not None:
        status.state, status.reason = "FINISHED", ""
    elif owner := owner_of(runs.lock(stage.name)):
        status.state, status.nodes = "RUNNING", owner["host"]
    elif states := [state for name, state in ended.items() if int(name.split("_")[0]) in numbers]:
        status.state = next((state for state in states if state != "COMPLETED"), "LOST")
    elif status.failure:
        status.state = "FAILED"
    elif numbers:
        status.state, status.reason = "LOST", "neither in the queue nor finished: smalti resubmit"
    elif runs.stage(stage.name).exists():
        status.state = "STOPPED"


def _add_progress(status: StageStatus, stage: Stage, config: PipelineConfig, runs: RunDirectory) -> None:
    lines = _metric_lines(runs.stage(stage.name) / "metrics.jsonl")
    training = config.training(stage.section)
    if lines and training is not None:
        status.step, status.steps = int(lines[-1]["step"]), training.steps
        rates = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
        if rates:
            status.rate = f"{rates[-1]:.3g} samples/s"
            left = training.steps - status.step
            status.stage_time_left_s = left * training.batch_size / rates[-1] if rates[-1] else None
    for line in reversed(lines):
        shown = [name for name in line if name not in _NOT_METRICS and not name.startswith("system/")]
        if shown:
            name = "loss" if "loss" in shown else shown[0]
            status.metric, status.value = name, line[name]
            break


def _metric_lines(path: Path) -> list[dict[str, float]]:
    """The last lines of a metrics.jsonl that may be megabytes long and end in the middle of a line."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        text = file.read().decode(errors="replace")
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def as_json(statuses: list[StageStatus]) -> str:
    return json.dumps([asdict(status) for status in statuses], indent=2)


def as_table(statuses: list[StageStatus]) -> str:
    """The table, and below it the last lines of failed jobs."""
    header = [
        "STAGE",
        "STATE",
        "JOB",
        "NODES",
        "TASKS",
        "STEP",
        "RATE",
        "LEFT",
        "METRIC",
        "RESTARTS",
        "LIMIT IN",
        "REASON",
    ]
    rows = []
    for s in statuses:
        at_work = s.state not in ("FINISHED", "STALE", "NOT RUN")
        step = f"{s.step}/{s.steps}" if s.step is not None else ""
        left = _duration(s.stage_time_left_s) if at_work and s.step != s.steps else ""
        rate = s.rate if at_work else ""
        restarts = str(s.restarts or "")
        rows.append(
            [
                s.stage,
                s.state,
                s.job,
                s.nodes,
                s.tasks_done,
                step,
                rate,
                left,
                f"{s.metric} {s.value:.4g}" if s.metric is not None else "",
                restarts,
                s.job_time_left,
                s.reason,
            ]
        )
    failures = [s.failure for s in statuses if s.failure]
    return "\n\n".join([format_table(header, rows), *failures])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
