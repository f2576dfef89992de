"""The local runner behind `smalti run`: every stage that is not up to date, one after the other.

Each stage is a process of its own, so a crash or a `kill -9` ends nothing else. With `processes` above 1 (or several
GPUs) torchrun starts several processes of a stage that trains; a stage that splits runs as many array tasks side by
side, and then the process that joins them. Imports no torch: a run with nothing to do takes a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.lock import Lock
from pipeline.orchestration.code_snapshot import CODE
from pipeline.orchestration.environment import RUNNER_VARIABLE
from pipeline.orchestration.graph import Stage, stages_of
from pipeline.orchestration.run_directory import RunDirectory

# A stage runs the code that runs this, and no module of the same name in the current folder.
IMPORTS_THIS_CODE = {
    "PYTHONPATH": os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONSAFEPATH": "1",
}


def run_pipeline(config: PipelineConfig, source: str, take_over: bool = False) -> None:
    """Bring every stage of the run up to date.

    Raises:
        StoppedOnRequest: a signal came; the running stage has saved what it had.
        UserError: a stage failed (it has said why), or the run directory is not ours.
    """
    runs = RunDirectory(config.run_directory)
    runs.check(source, take_over)
    with Lock(runs.lock("run"), f"the run in {runs.path}"):
        runs.open(config, source)
        for stage in stages_of(config):
            reasons = runs.stale_reasons(config, stage)
            if not reasons:
                _say(stage, "up to date")
                continue
            _say(stage, _shortened(reasons))
            _run_stage(stage, config, runs)
            if runs.manifest(stage.name) is None:
                raise StoppedOnRequest(f"{stage.name} was stopped on request")


def local_processes(config: PipelineConfig, stage: Stage) -> int:
    """How many processes this stage runs as on this machine."""
    if not (stage.trains or stage.shards):
        return 1
    return config.processes or max(len(_gpus()), 1)


def _run_stage(stage: Stage, config: PipelineConfig, runs: RunDirectory) -> None:
    processes = local_processes(config, stage)
    environment = os.environ | IMPORTS_THIS_CODE | {RUNNER_VARIABLE: str(os.getpid())}
    arguments = [stage.module, "--config", str(runs.path / "config.yaml")]
    single = [sys.executable, "-m", *arguments]
    if processes == 1:
        _run_processes(stage, runs, [single], [environment])
        return
    # Two threads on one busy core are many times slower than one.
    several = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))} | environment
    if stage.trains:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        _run_processes(stage, runs, [[sys.executable, "-m", *torchrun, *arguments]], [several])
        return
    tasks = range(processes)
    commands = [[*single, "--array-task", f"{task}/{processes}"] for task in tasks]
    if _run_processes(stage, runs, commands, [several | {"LOCAL_RANK": str(task)} for task in tasks]):
        _run_processes(stage, runs, [single], [environment])


def _run_processes(
    stage: Stage, runs: RunDirectory, commands: list[list[str]], environments: list[dict[str, str]]
) -> bool:
    """Run the commands side by side to their end; False if a signal asked to stop. One that fails stops the others.

    Raises:
        UserError: one failed.
    """
    children = [subprocess.Popen(c, env=environment) for c, environment in zip(commands, environments, strict=True)]
    stopping = _forward_signals_to(children)
    waiting, failed = list(children), 0
    while waiting:
        with suppress(subprocess.TimeoutExpired):
            waiting[0].wait(timeout=0.2 if len(waiting) > 1 else None)
        for child in [child for child in waiting if child.poll() is not None]:
            waiting.remove(child)
            if child.returncode and not failed:
                failed = child.returncode
                for other in waiting:
                    other.terminate()  # it finishes its current piece of work
    if failed and not stopping:
        how = f"was killed by {signal.Signals(-failed).name}" if failed < 0 else f"failed (exit {failed})"
        raise UserError(
            f"{stage.name} {how}: its last lines are above and in {runs.path / 'logs' / stage.name}.log;"
            f" fix the cause and rerun; it resumes"
        )
    return not stopping


def _forward_signals_to(children: list[subprocess.Popen[bytes]]) -> list[str]:
    """On a signal the stage saves and exits, and the runner waits for it. Returns the list that names such signals."""
    received: list[str] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, forward)
    return received


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    return [path.name for path in Path("/proc/driver/nvidia/gpus").glob("*")]


def _say(stage: Stage, message: str) -> None:
    click.echo(click.style(f"{stage.name:<16}", bold=True) + message, err=True)


def _shortened(reasons: list[str], limit: int = 6) -> str:
    more = f" and {len(reasons) - limit} more" if len(reasons) > limit else ""
    return "; ".join(reasons[:limit]) + more
