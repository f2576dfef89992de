"""The local runner behind `smalti run`: every stage that is not up to date, one after the other.

Each stage is a process of its own, so a crash or a `kill -9` ends nothing else. With `processes` above 1 (or several
GPUs) a stage that trains is as many processes that meet on loopback, with `hosts` as many as these say, there; a stage
that splits runs as many array tasks side by side, and then the process that joins them (prepare is one process, whose
workers are on all cores). Imports no torch: a run with
nothing to do takes a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from pipeline.config.pipeline import PipelineConfig
from pipeline.core import gpus
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.loopback import LOOPBACK, free_port
from pipeline.orchestration.at_work import refuse_other_config
from pipeline.orchestration.code_snapshot import CODE
from pipeline.orchestration.environment import RUNNER_VARIABLE
from pipeline.orchestration.graph import SHARES, STAGES, Stage, check_before_start, chosen_stages
from pipeline.orchestration.hosts import Host, RemoteRanks, ranks_on
from pipeline.orchestration.keep_finished import keep_finished
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.side_by_side import DEAF_TO_CTRL_C, ask_to_end, wait_for_all

# A stage runs the code that runs this, and no module of the same name in the current folder, which is where an empty
# entry of PYTHONPATH points, too.
IMPORTS_THIS_CODE = {
    "PYTHONPATH": os.pathsep.join([str(CODE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]),
    "PYTHONSAFEPATH": "1",
}
# What a launcher that started `smalti run` itself left; the stage's processes get their own.
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_pipeline(
    config: PipelineConfig,
    source: str,
    take_over: bool = False,
    *,
    first: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    amend: bool = False,
    hosts: tuple[Host, ...] = (),
) -> None:
    """Bring the stages of the run up to date: all; from `first` to the end; or `only` one. `dry_run`: say what runs.

    `amend`: what changed in the middle of a training is wanted. `hosts`: the machines that trainings run on, and
    nothing else; empty: this one.

    Raises:
        StoppedOnRequest: a signal came; the running stage has saved what it had.
        UserError: a stage failed (it has said why), or the run directory is not ours.
    """
    runs = RunDirectory(config.run_directory)
    stages = chosen_stages(config, first, only)
    check_before_start(config, lambda stage: _processes(config, stage, hosts))
    runs.check(source, take_over)
    for stage in stages:
        runs.go_on(config, stage, amend, check_only=True)
    if dry_run:
        _say_what_runs(config, runs, stages, amend)
        return
    stop = StopRequest()
    with runs.lock_run():
        refuse_other_config(runs.path, config)
        runs.open(config, source)
        if amend:
            keep_finished(runs, config)
        for stage in stages:
            reasons = runs.stale_reasons(config, stage) or runs.outside_changes(config, stage)
            if not reasons:
                _say(stage, "up to date")
                continue
            if stop.received:
                raise StoppedOnRequest(f"stopped by {stop.received} before {stage.name}")
            _say(stage, _shortened(reasons))
            _run_stage(stage, config, runs, stop, hosts, amend)
            # An old _SUCCESS, of another config, says nothing of this stage.
            if runs.stale_reasons(config, stage) or (stop.received and runs.outside_changes(config, stage)):
                raise StoppedOnRequest(f"{stage.name} was stopped on request")


def _say_what_runs(config: PipelineConfig, runs: RunDirectory, stages: tuple[Stage, ...], amend: bool) -> None:
    # A run that branches off begins with what the other one has finished, but the report.
    origin = None if runs.path.exists() else config.branched_from
    known = RunDirectory(origin) if origin else runs
    for stage in stages:
        reasons = known.stale_reasons(config, stage) or known.stale_inputs(config, stage)
        reasons = reasons or known.outside_changes(config, stage)
        if amend:  # a training that is finished stays so
            reasons = [reason for reason in reasons if f"{SHARES}: " not in reason]
        if origin and stage is STAGES[-1]:
            reasons = reasons or ["not run yet"]
        finished = f"would be taken over from {origin}" if origin else "up to date"
        _say(stage, f"would run: {_shortened(reasons)}" if reasons else finished)


def local_processes(config: PipelineConfig, stage: Stage) -> int:
    """How many processes this stage runs as on this machine. Raises UserError if a training's would share GPUs."""
    if stage.workers or not (stage.trains or stage.shards):
        return 1
    found = len(_gpus())
    if stage.trains and config.processes:
        gpus.refuse_more_than(found, config.processes)
    return config.processes or max(found, 1)


def _processes(config: PipelineConfig, stage: Stage, hosts: tuple[Host, ...]) -> int:
    return sum(host.slots for host in hosts) if hosts and stage.trains else local_processes(config, stage)


def _run_stage(
    stage: Stage,
    config: PipelineConfig,
    runs: RunDirectory,
    stop: StopRequest,
    hosts: tuple[Host, ...] = (),
    amend: bool = False,
) -> None:
    processes = local_processes(config, stage)
    outside = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    environment = outside | IMPORTS_THIS_CODE | {RUNNER_VARIABLE: str(os.getpid())}
    arguments = [stage.module, "--config", str(runs.path / "config.yaml"), *(["--amend"] if amend else [])]
    single = [sys.executable, "-m", *arguments]
    if hosts and stage.trains:
        _run_on_hosts(stage, runs, single, hosts, stop)
        return
    if processes == 1:
        _run_processes(stage, runs, [single], [environment], stop)
        return
    # Two threads on one busy core are many times slower than one.
    several = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))} | environment
    if stage.trains:
        _run_processes(stage, runs, [single] * processes, [several | ranks for ranks in _ranks(processes)], stop)
        return
    tasks = range(processes)
    commands = [[*single, "--array-task", f"{task}/{processes}"] for task in tasks]
    _run_processes(stage, runs, commands, [several | {"LOCAL_RANK": str(task)} for task in tasks], stop)
    if not stop.received:
        _run_processes(stage, runs, [single], [environment], stop)


def _run_on_hosts(
    stage: Stage, runs: RunDirectory, command: list[str], hosts: tuple[Host, ...], stop: StopRequest
) -> None:
    environments = [[IMPORTS_THIS_CODE | rank for rank in ranks] for ranks in ranks_on(hosts)]
    children = [RemoteRanks(host, command, own) for host, own in zip(hosts, environments, strict=True)]
    _wait_for(stage, runs, children, stop)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What each process of a training must know of the others, in torchrun's words."""
    place = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run_processes(
    stage: Stage, runs: RunDirectory, commands: list[list[str]], environments: list[dict[str, str]], stop: StopRequest
) -> None:
    """Run the commands side by side to their end. One that fails stops the others.

    Raises:
        UserError: one failed, and no signal asked to stop.
    """
    children = [
        subprocess.Popen([*DEAF_TO_CTRL_C, *command], env=environment)
        for command, environment in zip(commands, environments, strict=True)
    ]
    _wait_for(stage, runs, children, stop)


def _wait_for(stage: Stage, runs: RunDirectory, children: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> None:
    stop.pass_on_to(children)
    failed = wait_for_all(children, meet=stage.trains)
    if failed and not stop.received:
        how = f"was killed by {signal.Signals(-failed).name}" if failed < 0 else f"failed (exit {failed})"
        raise UserError(
            f"{stage.name} {how}: its last lines are above and in {runs.path / 'logs' / stage.name}.log;"
            f" fix the cause and rerun; it resumes"
        )


class StopRequest:
    """A signal that asked the runner to stop. The running stage gets a SIGTERM, saves and exits; the runner waits."""

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the signal
        self._children: Sequence[subprocess.Popen[bytes]] = ()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def pass_on_to(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """From now on these processes are the stage; they get a signal that came while they were started, too."""
        self._children = children
        if self.received:
            ask_to_end(self._children)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        ask_to_end(self._children)


def _gpus() -> list[str]:
    visible = gpus.listed(os.environ)
    return visible if visible is not None else [path.name for path in Path("/proc/driver/nvidia/gpus").glob("*")]


def _say(stage: Stage, message: str) -> None:
    click.echo(click.style(f"{stage.name:<16}", bold=True) + message, err=True)


def _shortened(reasons: list[str], limit: int = 6) -> str:
    more = f" and {len(reasons) - limit} more" if len(reasons) > limit else ""
    return "; ".join(reasons[:limit]) + more
