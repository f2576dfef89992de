"""`smalti runs`: the runs of a folder, what of them may be deleted, and two of them side by side."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import click

from pipeline.config.base import differences
from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.writable import check_writable
from pipeline.orchestration.disk_usage import asked_for, deletable, delete, is_at_work, runs_in, size_of, size_of_run
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.report.numbers import metric, size
from pipeline.slurm.status import StageStatus, run_status
from pipeline.slurm.table import format_table

_HEADER = ("RUN", "STATE", "STAGE", "STEP", "METRICS", "SIZE", "CHANGED")
_BEST_OF_TRANSFORMER = "val/bits/image_token"
_DONE = {"FINISHED", "STALE"}


@click.group(invoke_without_command=True)
@click.option(
    "--in", "folder", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="folder of runs"
)
@click.option("--disk", is_flag=True, help="list what may be deleted instead, largest first")
@click.option("--prune", is_flag=True, help="delete that, after asking")
@click.option("--yes", is_flag=True, help="with --prune: do not ask")
@click.option("--json", "json_output", is_flag=True, help="print a list of objects, one per run")
@click.pass_context
def runs(context: click.Context, folder: Path, disk: bool, prune: bool, yes: bool, json_output: bool) -> None:
    """List runs with state, stage, best metrics and size; or what of them may be deleted.

    `smalti runs compare A B` shows two of them side by side.
    """
    if context.invoked_subcommand is not None:
        return
    if disk or prune:
        _disk(folder, prune, yes)
        return
    lines = [_line(run) for run in runs_in(folder)]
    if json_output:
        click.echo(json.dumps([dict(zip(map(str.lower, _HEADER), line, strict=True)) for line in lines], indent=2))
    else:
        click.echo(format_table(_HEADER, lines) if lines else f"no runs in {folder}")


@runs.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="write a page with images side by side to this HTML file"
)
def compare(first: Path, second: Path, out: Path | None) -> None:
    """Show in which config keys and metrics two runs differ; with -o, their images side by side."""
    if out:
        check_writable(out)
    configs = [load_pipeline(config_of(run)) for run in (first, second)]
    keys = differences(*(config.model_dump(mode="json", exclude={"runs", "name"}) for config in configs))
    click.echo(f"{first} -> {second}")
    click.echo("\n".join(keys) if keys else "the same config")
    from pipeline.report.compare_runs import compared_metrics, comparison_page, side_of

    left, right = (side_of(run, config) for run, config in zip((first, second), configs, strict=True))
    for why in left.left_out + right.left_out:
        click.echo(why, err=True)
    rows = compared_metrics(left, right)
    if rows:
        click.echo("\n" + format_table(("METRIC", first.name, second.name), [row.cells() for row in rows]))
    if out:
        out.write_text(comparison_page(left, right, keys, rows))
        click.echo(f"open {out}", err=True)


def _line(run: Path) -> list[str]:
    try:
        return _readable_line(run, RunDirectory(run.resolve()))
    except UserError as error:  # of a later version, or damaged: the others are listed all the same
        why = str(error)
    except OSError as error:  # somebody else's
        why = f"{error.strerror}: {error.filename}"
    return [run.name, "UNREADABLE", "", "", why, size(size_of([run])), _changed(run)]


def _readable_line(run: Path, directory: RunDirectory) -> list[str]:
    stages, _ = run_status(directory, files=False)
    state, at = _state(run, stages)
    step = f"{at.step}/{at.steps}" if at and at.step is not None else ""
    total, estimated = size_of_run(directory)
    shown = f"{'~' if estimated else ''}{size(total)}"
    return [run.name, state, at.stage if at else "", step, _metrics(run), shown, _changed(run)]


def _state(run: Path, stages: list[StageStatus]) -> tuple[str, StageStatus | None]:
    """In a word, and the stage that it is about."""
    open_stages = [status for status in stages if status.state not in _DONE]
    if not open_stages:
        stale = [status for status in stages if status.state == "STALE"]
        return ("STALE", stale[0]) if stale else ("FINISHED", None)
    begun = [status for status in open_stages if status.state != "NOT RUN"]
    at = begun[0] if begun else open_stages[0]
    if is_at_work(run):
        return "RUNNING", at
    return (at.state if begun else "STOPPED" if len(open_stages) < len(stages) else "NOT RUN"), at


def _metrics(run: Path) -> str:
    """The Fréchet distance of the samples, and the lowest bits per image token of the transformer."""
    from pipeline.evaluation.results import read_results, rows_in

    found = []
    with suppress(UserError, OSError, KeyError, TypeError):
        rows = rows_in(read_results(run / "evaluate"))
        distances = [row for row in rows if row.metric.startswith(("FD", "FID")) and row.value is not None]
        found += [f"{row.metric} {metric(row.value)}" for row in distances[:1]]
    losses = []
    with suppress(OSError), open(run / "transformer" / "metrics.jsonl", errors="replace") as lines:
        for line in lines:
            if _BEST_OF_TRANSFORMER in line:  # of a million lines some
                with suppress(ValueError, TypeError, KeyError):
                    losses.append(json.loads(line)[_BEST_OF_TRANSFORMER])
    if losses:
        found.append(f"{_BEST_OF_TRANSFORMER} {min(losses):.4g}")
    return ", ".join(found)


def _changed(run: Path) -> str:
    newest = run.stat().st_mtime
    with suppress(OSError):
        newest = max((path.stat().st_mtime for path in run.glob("*/metrics.jsonl")), default=newest)
    return datetime.fromtimestamp(newest).strftime("%Y-%m-%d %H:%M")


def _disk(folder: Path, prune: bool, yes: bool) -> None:
    found, left_alone = deletable(folder)
    found = sorted(found, key=lambda entry: -entry.bytes)
    for why in dict.fromkeys(left_alone.values()):
        names = ", ".join(name for name, its in left_alone.items() if its == why)
        click.echo(f"left alone, since {why}: {names}", err=True)
    for export in asked_for(folder):
        click.echo(f"kept, since somebody asked for it: {export} ({size(size_of([export]))})", err=True)
    if not found:
        click.echo(f"nothing in {folder} may be deleted")
        return
    total = size_of(path for entry in found for path in entry.paths)
    click.echo(format_table(("SIZE", "WHAT", "WHY"), [(size(e.bytes), str(e.path), e.why) for e in found]))
    click.echo(f"{size(total)} in all" + ("" if prune else "; delete it with --prune"))
    if not prune or not (yes or click.confirm("delete all of this?")):
        return
    failed = 0
    for entry in found:
        try:
            delete(entry, folder)
        except OSError as error:
            failed += 1
            click.echo(f"{entry.path} stays: {error.strerror}", err=True)
    click.echo("deleted" if not failed else f"deleted all but {failed}")
