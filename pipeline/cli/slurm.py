"""`smalti submit | status | logs | cancel | resubmit`."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import click

from pipeline.cli.stage import AMEND, TAKE_OVER
from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import STAGE_NAMES
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.run_record import source_name
from pipeline.slurm import scheduler
from pipeline.slurm.cluster import load_cluster
from pipeline.slurm.status import as_json, as_table, run_status
from pipeline.slurm.submit import submit_pipeline

_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_run = click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
_stages = click.Choice(STAGE_NAMES)
_first = click.option("--from", "first", type=_stages, help="this stage and what comes after it")
_only = click.option("--only", type=_stages, help="this stage alone")
_POLL_S = 10.0  # what many people ask a controller for all day


@click.command()
@click.argument("config_path", metavar="CONFIG")
@_overrides
@click.option("--cluster", "cluster_path", required=True, help="cluster file, e.g. configs/cluster/example.yaml")
@_first
@_only
@click.option("--dry-run", is_flag=True, help="write the job files to slurm/dry-run, print the table, change nothing")
@click.option("--take-over", is_flag=True, help=TAKE_OVER)
@click.option("--amend", is_flag=True, help=AMEND)
def submit(
    config_path: str,
    overrides: tuple[str, ...],
    cluster_path: str,
    first: str | None,
    only: str | None,
    dry_run: bool,
    take_over: bool,
    amend: bool,
) -> None:
    """Submit every stage that is not finished to Slurm, as a chain of jobs."""
    config, cluster = load_pipeline(config_path, overrides), load_cluster(cluster_path)
    source = source_name(config_path)
    submit_pipeline(config, source, cluster, first=first, only=only, dry_run=dry_run, take_over=take_over, amend=amend)
    if not dry_run:
        click.echo(f"follow it with: smalti status {config.run_directory}", err=True)


@click.command()
@_run
@click.option("--cluster", "cluster_path", help="another cluster file than at the last submission")
@_first
@_only
def resubmit(run_directory: Path, cluster_path: str | None, first: str | None, only: str | None) -> None:
    """Submit again what failed or was cancelled, and what waited for it, with the run's own config."""
    known = run_directory / "slurm" / "cluster.yaml"
    if cluster_path is None and not known.is_file():
        raise UserError(f"expected a submitted run, found no {known}: use smalti submit CONFIG --cluster FILE")
    path = str(run_directory / "config.yaml")
    cluster = load_cluster(cluster_path or known)
    submit_pipeline(load_pipeline(path), source_name(path), cluster, first=first, only=only)


@click.command()
@_run
@click.option("--watch", is_flag=True, help="refresh every ten seconds, by records alone, until all is at rest")
@click.option("--json", "json_output", is_flag=True, help="print a list of objects, one per stage")
def status(run_directory: Path, watch: bool, json_output: bool) -> None:
    """Show each stage's state, job, nodes, step, rate, last metric, restarts, time left and failure."""
    runs = RunDirectory(run_directory.resolve())
    while True:
        statuses, problem = run_status(runs, files=not watch)
        if watch and not json_output:
            click.clear()
        click.echo(as_json(statuses) if json_output else as_table(statuses))
        if problem:
            click.echo(f"without Slurm's answer: {problem}", err=True)
        at_rest = {"FINISHED", "STALE", "NOT RUN", "LOST", "STOPPED"} | scheduler.ENDED
        if not watch or all(status.state in at_rest for status in statuses):
            return
        try:
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            return


@click.command()
@_run
@click.argument("stage", type=_stages)
@click.option("--task", type=int, help="log of this task of an array")
@click.option("-f", "--follow", is_flag=True, help="keep printing as it grows, until Ctrl-C")
@click.option("-n", "--lines", default=50, show_default=True, help="number of last lines; 0: all")
def logs(run_directory: Path, stage: str, task: int | None, follow: bool, lines: int) -> None:
    """Show what the newest job of a stage printed; each line begins with its rank."""
    path = _newest_log(run_directory, stage, task)
    click.echo(click.style(str(path), bold=True), err=True)
    with open(path, errors="replace") as file:
        text = file.read()
        click.echo("".join(text.splitlines(keepends=True)[-lines:] if lines else text), nl=False)
        with suppress(KeyboardInterrupt):
            while follow:
                if text := file.read():
                    click.echo(text, nl=False)
                else:
                    time.sleep(0.5)


def _newest_log(run_directory: Path, stage: str, task: int | None) -> Path:
    folder = run_directory / "logs"
    pattern = f"slurm/{stage}-*.log" if task is None else f"slurm/{stage}-*_{task}.log"
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    if not found and task is None:
        found = [path for path in [folder / f"{stage}.log"] if path.exists()]
    if not found:
        raise UserError(f"expected a log of {stage} in {folder}, found none: it has not started (see smalti status)")
    return found[-1]


@click.command()
@_run
def cancel(run_directory: Path) -> None:
    """Cancel this run's jobs, and no others. What is finished or saved stays; `smalti resubmit` resumes."""
    directory = run_directory.resolve()
    active = [job for job in scheduler.jobs_of(directory) if job.active]
    # The last ones first: none that waits may start when what it waits for ends.
    ids = sorted({job.id for job in active}, reverse=True)
    scheduler.cancel(ids)
    click.echo(f"cancelled: {', '.join(map(str, ids))}" if ids else f"no job of {directory} is queued or running")


COMMANDS = (submit, resubmit, status, logs, cancel)
