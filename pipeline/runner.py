"""The local runner behind `smalti run`: every stage that is not up to date, one after the other.

Each stage is a process of its own (torchrun starts several when there are several GPUs), so a crash
or a `kill -9` takes nothing else along. Imports no torch: a run with nothing to do takes a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import click

from pipeline.errors import StoppedOnRequest, UserError
from pipeline.graph import STAGES, PipelineConfig, Stage
from pipeline.lock import Lock
from pipeline.runs import RunDirectory
from pipeline.stage import RUNNER_VARIABLE


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
        for stage in STAGES:
            reasons = runs.why_not_done(config, stage)
            if not reasons:
                _say(stage, "up to date")
                continue
            _say(stage, _shortened(reasons))
            _run_stage(stage, config, runs)
            if runs.manifest(stage.name) is None:
                raise StoppedOnRequest(f"{stage.name} was stopped on request")


def local_processes(config: PipelineConfig, stage: Stage) -> int:
    if not stage.trains:
        return 1
    return config.processes or max(len(_gpus()), 1)


def _run_stage(stage: Stage, config: PipelineConfig, runs: RunDirectory) -> None:
    command = [sys.executable, "-m"]
    processes = local_processes(config, stage)
    environment = os.environ | {RUNNER_VARIABLE: str(os.getpid())}
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        # Two threads on one busy core are many times slower than one.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    command += [stage.module, "--config", str(runs.path / "config.yaml")]
    child = subprocess.Popen(command, env=environment)
    stopping = _forward_signals_to(child)
    status = child.wait()
    if status and not stopping:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed (exit {status})"
        raise UserError(
            f"{stage.name} {how}: its last lines are above and in {runs.path / 'logs' / stage.name}.log;"
            f" put the cause right and run the same command again, it goes on from there"
        )


def _forward_signals_to(child: subprocess.Popen[bytes]) -> list[str]:
    """The stage saves and exits on a signal, and the runner waits for it. Returns the signals that came."""
    received: list[str] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
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
