"""Does a training that is killed at random moments around saves always leave a complete checkpoint, and end the same?

    report = kills(Training(run, processes=2), count=60)

Each life is the stage transformer as `python -m stages.transformer` runs it, in processes that are forked from this
one, which has imported everything: so a life costs seconds. They save after each step, and get SIGKILL, each at a
moment of its own, up to 0.3 s after the first to fifth save of the life began. A training that reaches its end is
compared, and begun anew.
"""

from __future__ import annotations

import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.atomic_io import read_json
from pipeline.core.loopback import LOOPBACK, free_port
from pipeline.core.manifest import first_fault
from pipeline.orchestration.environment import RUNNER_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
_BEFORE = ("prepare", "text_tokenizer", "image_tokenizer", "tokenize")
_KILLED_WITHIN_S = 0.3  # of the beginning of a save
_SAVES = 5  # of a life, at most


@dataclass(frozen=True)
class Training:
    """The training of the transformer of a run."""

    run: Path
    processes: int = 1
    steps: int = 40
    settings: tuple[str, ...] = ()  # more of the config, as on a command line

    @property
    def stage(self) -> Path:
        """Its folder."""
        return self.run / "transformer"

    def result(self) -> dict[str, object]:
        """The record of what it ended with, by file."""
        files = read_json(self.stage / "checkpoints" / f"step-{self.steps:08d}" / "manifest.json")["files"]
        outputs = read_json(self.stage / "manifest.json")["outputs"]
        return {**files, **outputs}


@dataclass
class Report:
    """What the kills left."""

    kills: int = 0
    ends: int = 0  # trainings that reached their last step
    other_weights: int = 0  # of these, that ended with other bits than the undisturbed one
    half_saves: int = 0  # kills that found a save under way
    faults: list[str] = field(default_factory=list)  # a checkpoint that is not complete, or progress that was lost

    @property
    def holds(self) -> bool:
        """Whether no promise was broken, and one end was seen."""
        return self.ends > 0 and not self.other_weights and not self.faults


def prepared_run(folder: Path) -> Path:
    """A tiny run in `folder` whose stages before the transformer are finished."""
    for stage in _BEFORE:
        command = [sys.executable, "-m", f"stages.{stage}", "--config", str(TINY), f"runs={folder}"]
        subprocess.run([*command, "tracking.enabled=false"], cwd=ROOT, check=True, capture_output=True)
    return folder / "tiny"


def kills(training: Training, count: int, seed: int = 0, seconds: float = 1e9) -> Report:
    """Kill the training `count` times, anew when it has ended, and go on until the one that was killed last ends.

    Args:
        seconds: after these it kills no more.
    """
    deadline = time.monotonic() + seconds
    chance, report = random.Random(seed), Report()
    stage = training.stage
    _import_everything()
    _live(training, None)
    undisturbed = training.result()
    shutil.rmtree(stage)
    newest = 0
    while (kill := report.kills < count and time.monotonic() < deadline) or newest:
        _live(training, chance if kill else None, newest)
        if not (stage / "_SUCCESS").exists():
            report.kills += 1
            report.half_saves += bool(list((stage / "checkpoints").glob("*.tmp")))
            newest = _check(stage, newest, report)
        else:
            report.ends += 1
            report.other_weights += training.result() != undisturbed
            shutil.rmtree(stage)
            newest = 0
    return report


def _check(stage: Path, before: int, report: Report) -> int:
    """Look at all checkpoints; the newest one's step."""
    newest = 0
    for path in sorted((stage / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d+", path.name):
            complete = (path / "manifest.json").is_file()
            fault = first_fault(path, read_json(path / "manifest.json")["files"]) if complete else "no manifest"
            if fault:
                report.faults.append(f"kill {report.kills}: {fault}")
            newest = int(path.name[5:])
    if newest < before:
        report.faults.append(f"kill {report.kills}: expected step {before} or later, found {newest}")
    return newest


def _import_everything() -> None:
    os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    runpy.run_module("stages.transformer", run_name="imported")


def _live(training: Training, chance: random.Random | None, newest: int = 0) -> None:
    """One life of the training, from step `newest` on. With `chance` it is killed, if it does not end before."""
    port, began = free_port(), time.monotonic()
    ranks = [_fork(training, rank, port) for rank in range(training.processes)]
    dead: dict[int, int] = {}
    killed = False
    if chance:
        save = newest + chance.randint(1, _SAVES)
        while not dead and _latest_save(training.stage / "checkpoints") < save:
            _reap(ranks, dead)
            time.sleep(0.002)
        _expect_no_failure(training, dead)
        for rank in chance.sample(ranks, len(ranks)):
            time.sleep(chance.uniform(0, _KILLED_WITHIN_S / len(ranks)))
            _reap(ranks, dead)
            if rank not in dead:
                os.kill(rank, signal.SIGKILL)
                killed = True
    while len(dead) < len(ranks):
        _reap(ranks, dead)
        time.sleep(0.002)
        if time.monotonic() - began > 300:
            for rank in set(ranks) - set(dead):
                os.kill(rank, signal.SIGKILL)
    if not killed:
        _expect_no_failure(training, dead)


def _expect_no_failure(training: Training, dead: dict[int, int]) -> None:
    if any(dead.values()):
        raise RuntimeError(f"a training failed by itself: see {training.run / 'logs' / 'transformer.log'}")


def _latest_save(checkpoints: Path) -> int:
    """The step of the latest save that has begun; 0: none has."""
    return max((int(path.name[5:13]) for path in checkpoints.glob("step-*")), default=0)


def _reap(ranks: list[int], dead: dict[int, int]) -> None:
    for rank in ranks:
        if rank not in dead:
            pid, status = os.waitpid(rank, os.WNOHANG)
            if pid:
                dead[rank] = os.waitstatus_to_exitcode(status)


def _fork(training: Training, rank: int, port: int) -> int:
    """A process of the stage; its id."""
    if child := os.fork():
        return child
    run, processes, steps = training.run, training.processes, training.steps
    log = os.open(run / "logs" / f"lives-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.pop(RUNNER_VARIABLE, None)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port))
    options = {"steps": steps, "checkpoint_every": 1, "precision": "fp32", "ema_decay": 0.9, "warmup_steps": 5}
    options |= {"evaluate_every": steps, "log_images_every": steps, "stop_check_every": 2}
    settings = [*training.settings, *(f"transformer.training.{name}={value}" for name, value in options.items())]
    settings += [f"transformer.deepspeed.zero_stage={3 if processes > 1 else 1}", "tracking.enabled=false"]
    sys.argv = ["transformer", "--config", str(run / "config.yaml"), *settings]
    runpy.run_module("stages.transformer", run_name="__main__", alter_sys=True)
    os._exit(70)  # a stage ends its process
