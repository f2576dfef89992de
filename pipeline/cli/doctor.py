"""`smalti doctor`: a line for each thing that a training relies on: fine, or what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.doctor import cluster as slurm
from pipeline.doctor import machine, packages, storage
from pipeline.doctor import run as runs
from pipeline.doctor.finding import Check, Finding, Level, fail, findings, ok

_COLORS = {Level.OK: "green", Level.NOTE: None, Level.WARN: "yellow", Level.FAIL: "red"}
_NAME_WIDTH = 24


@click.command()
@click.argument("config_path", metavar="[CONFIG|RUN]", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--cluster", "cluster_path", type=click.Path(path_type=Path), help="cluster file to compare with the cluster"
)
def doctor(config_path: str | None, overrides: tuple[str, ...], cluster_path: Path | None) -> None:
    """Say what of this machine, this cluster and this run would stop a training, and what to do.

    Looks only; what it writes to measure a disk it removes. Exit 1 if something must be done.
    """
    failed = 0
    for finding in _findings(config_path, overrides, cluster_path):
        failed += finding.level is Level.FAIL
        level = click.style(f"{finding.level.value:4}", fg=_COLORS[finding.level])
        click.echo(f"{level}  {finding.name:{_NAME_WIDTH}}  {finding.text}")
    if failed:
        click.echo(f"{failed} thing{'s' if failed > 1 else ''} to do", err=True)
        sys.exit(1)


def _findings(config_path: str | None, overrides: tuple[str, ...], cluster_path: Path | None) -> Iterator[Finding]:
    config: PipelineConfig | None = None
    if config_path:
        try:
            config = load_pipeline(config_path, overrides)
        except UserError as error:
            yield fail("config", str(error))
        else:
            yield ok("config", f"{config_path}: the run {config.name}")
    for name, check in _checks(config, cluster_path).items():
        yield from findings(name, check)


def _checks(config: PipelineConfig | None, cluster_path: Path | None) -> dict[str, Check]:
    """By the name that an error of their own gets, cheap ones first."""
    checks: dict[str, Check] = {
        "python": packages.python,
        "packages": packages.required,
        "imports": packages.imported,
        "extras": packages.extras,
        "environment": packages.variables,
        "processors": machine.processors,
        "open files": machine.open_files,
        "compiler": machine.compiler,
        "gpus": machine.gpus,
        "network": machine.interfaces,
        "disk": partial(storage.storage, config.run_directory if config else Path("runs")),
        "slurm": partial(slurm.cluster, cluster_path),
        "weights": partial(runs.extractors, config),
    }
    if config:
        checks |= {
            "stages": partial(runs.stages, config, cluster_path),
            "run directory": partial(runs.run_directory, config),
            "mlflow": partial(runs.tracking, config),
        }
    return checks
