"""Faults of jobs on a real Slurm: what happens, and after how long the work goes on.

    python -m benchmarks.slurm_faults [WORD ...]     # faults with one of these words in their names; all

On `slurm/testbed`, a transformer of 2 nodes × 1 process trains on and on while one fault after the other hits it. For
each: how its life ended, by the supervisor's record; seconds until Slurm started the job again; seconds until a step
was logged after that, which on this machine is mostly the start of Python. Time limits count from the end of the life,
as Slurm looks at them every 30 s. Then come those that are to fail: an error at one step, whoever gets there, and time
limits without progress, with the seconds until the job has failed; and the task of an array that dies, with the seconds
until the array is joined.

The testbed requeues after 6 s, asks dead nodes for 6 s and kills after 5 s; a cluster's defaults are 121, 300 and 30 s:
add the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline.slurm.supervisor.record import read_record, record_path
from tests.conftest import TINY
from tests.launch import launch
from tests.slurm.conftest import (
    Slurm,
    Training,
    cluster_file,
    processes_of,
    signal_all,
    start,
    stop,
)
from tests.slurm.conftest import wait_until as wait_for

LONG = ("steps=1000000", "checkpoint_every=20", "log_every=1")
# A rank that gets SIGHUP fails as a library would, wherever it is: a traceback and exit 1.
FAILS_WHEN_ASKED = """
import os, signal
def fail(*_):
    raise RuntimeError("a library has failed")
if "RANK" in os.environ:
    signal.signal(signal.SIGHUP, fail)
"""
# A launcher, before `python -m MODULE ARGUMENTS`: runs that, but one of its steps fails.
POISON = """
import runpy, sys
from pipeline.training import trainer
seed_step = trainer.seed_step
def poisoned(seed, step, rank):
    if step == 57 and rank == 1:
        raise ValueError("the sample of step 57 is poisoned")
    seed_step(seed, step, rank)
trainer.seed_step = poisoned
module = sys.argv[3]
sys.argv = sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
STAGES = "{transformer: {nodes: 2, tasks_per_node: 1}}"
wait_until = partial(wait_for, seconds=1200)  # this machine may have other work
ENDED = ("FAILED", "TIMEOUT")  # the second where Slurm itself kills the last life


def main() -> None:
    slurm = start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run(slurm, Path(folder))
        finally:
            slurm("scancel", "--me")
            wait_until("the end of its jobs", lambda: not slurm("squeue", "-h").strip())
            stop(slurm)


def _run(slurm: Slurm, folder: Path) -> None:
    overrides = [f"runs={folder}", "tracking.enabled=false", *(f"transformer.training.{change}" for change in LONG)]
    for stage in ("prepare", "text-tokenizer", "image-tokenizer", "tokenize"):
        launch("pipeline", "run", str(TINY), *overrides, "--only", stage)
    copies = {
        name: Path(shutil.copytree(folder / "tiny", folder / name / "tiny")) for name in ("bug", "hangs", "array")
    }
    print(f"{'fault':<44}{'outcome':<28}{'job again':>10}  {'and then':>26}", flush=True)
    _of_a_training(slurm, folder)
    if _wanted(name := "a poisoned step"):
        _until_failed(name, _poisoned(slurm, copies["bug"]), lambda _training: None)
    if _wanted(name := "time limits without progress"):
        training = Training(slurm, copies["hangs"], 2, stages=STAGES, preflight="never", max_time_limits="2")
        _until_failed(name, training, _HangingRanks())
    if _wanted(name := "the task of an array is killed (SIGKILL)"):
        _of_an_array(name, slurm, copies["array"])


def _wanted(name: str) -> bool:
    words = sys.argv[1:]
    return not words or any(word in name for word in words)


def _tell(name: str, outcome: str, again_s: float | None, then: str) -> None:
    again = "" if again_s is None else f"{again_s:.1f} s"
    print(f"{name:<44}{outcome:<28}{again:>10}  {then:>26}", flush=True)


def _of_a_training(slurm: Slurm, folder: Path) -> None:
    """Faults from which it comes back."""
    faults: dict[str, Callable[[Training], object]] = {
        "a rank is killed (SIGKILL)": lambda training: os.kill(training.ranks()[1], signal.SIGKILL),
        "a rank dies (SIGSEGV)": lambda training: os.kill(training.ranks()[1], signal.SIGSEGV),
        "a rank fails (exit 1)": lambda training: os.kill(training.ranks()[1], signal.SIGHUP),
        "preemption, no grace": lambda _training: _preempt(slurm, 0),
        "preemption, 60 s of grace": lambda _training: _preempt(slurm, 60),
        "the time limit is near": lambda training: _at_the_limit(training, "now+1minute"),
        "the time limit is here before they saved": lambda training: _at_the_limit(training, "now+1"),
        "scontrol requeue": lambda training: slurm("scontrol", "requeue", str(training.id)),
        "scancel --signal=USR2": lambda training: slurm("scancel", "--signal=USR2", str(training.id)),
        "a node dies and is back after 10 s": lambda _training: _power_cut(slurm),
        "the controller is away for 10 s": lambda _training: _controller(slurm),
        "USR2 where requeue is forbidden": _without_requeue,
    }
    wanted = {name: fault for name, fault in faults.items() if _wanted(name)}
    if not wanted:
        return
    training = Training(slurm, folder / "tiny", 2, "preempt", stages=STAGES, setup=_fails_when_asked(folder))
    _wait_for_a_step(training, 0.0)
    for name, fault in wanted.items():
        lives, hit = len(training.lives()), time.time()
        fault(training)
        if "controller" in name:
            again, outcome = None, "goes on"
        else:
            wait_until(name, lambda lives=lives: len(training.lives()) > lives)  # type: ignore[misc]
            before, now = training.lives()[-2:]
            hit = before["ended"] if "time limit" in name else hit
            again, outcome = now["started"] - hit, before["outcome"] or "by Slurm"
        back = _wait_for_a_step(training, hit + (again or 10.0)) - hit
        _tell(name, outcome, again, f"trains after {back:.1f} s")
    slurm("scancel", str(training.id))
    wait_until("its end", lambda: training.state() not in ("RUNNING", "PENDING", "COMPLETING"))


def _fails_when_asked(folder: Path) -> str:
    """The `setup` of a cluster file with which ranks fail when they get SIGHUP."""
    (folder / "asked").mkdir()
    (folder / "asked" / "sitecustomize.py").write_text(FAILS_WHEN_ASKED)
    return json.dumps([f"export PYTHONPATH={folder / 'asked'}"])


def _wait_for_a_step(training: Training, after: float) -> float:
    """When the first step after this time was logged, in seconds since the epoch."""
    path = training.run / "transformer" / "metrics.jsonl"
    wait_until("a step", lambda: path.exists() and path.stat().st_mtime > after and training.step() > 0)
    return time.time()


def _preempt(slurm: Slurm, grace: int) -> None:
    slurm("scontrol", "update", "partition=preempt", f"GraceTime={grace}")
    slurm("sbatch", "-p", "normal", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def _without_requeue(training: Training) -> None:
    training.slurm("scontrol", "update", f"jobid={training.id}", "requeue=0")
    training.slurm("scancel", "--signal=USR2", str(training.id))
    wait_until("the successor", lambda: _newest_job(training) != training.id)
    training.id = _newest_job(training)


def _newest_job(training: Training) -> int:
    jobs: list[dict[str, int]] = json.loads((training.run / "slurm" / "jobs.json").read_text())
    return jobs[-1]["id"]


def _at_the_limit(training: Training, end: str) -> None:
    before = len(training.lives())
    training.slurm("scontrol", "update", f"jobid={training.id}", f"EndTime={end}")
    wait_until("the requeue", lambda: training.state() == "PENDING" or len(training.lives()) > before)
    training.slurm("scontrol", "update", f"jobid={training.id}", "TimeLimit=30")


def _power_cut(slurm: Slurm) -> None:
    slurm.testbed("crash", "node2")
    time.sleep(10)
    slurm.testbed("boot", "node2")


def _controller(slurm: Slurm) -> None:
    slurm.testbed("crash", "slurmctld")
    time.sleep(10)
    slurm.testbed("boot", "slurmctld")


def _until_failed(name: str, training: Training, meanwhile: Callable[[Training], None]) -> None:
    """A job that is to fail: how its lives ended, and how long that took from the end of the first one."""

    def ended() -> bool:
        meanwhile(training)
        return training.state() in ENDED

    wait_until(name, ended, share=0.5, run=training.run)
    lives = training.lives()
    outcomes = dict.fromkeys(life["outcome"] for life in lives)
    taken = lives[-1]["ended"] - lives[0]["ended"]
    said = f"{len(lives)} lives, {', '.join(outcomes)}"
    _tell(name, said, lives[1]["started"] - lives[0]["ended"], f"{training.state()} after {taken:.1f} s")
    print(f"    {read_record(record_path(training.run, 'transformer')).failure.splitlines()[0]}", flush=True)


def _poisoned(slurm: Slurm, run: Path) -> Training:
    """A training whose rank 1 fails at one step, whenever it gets there."""
    (run.parent / "poison.py").write_text(POISON)
    python = json.dumps(sys.executable)
    launcher = f"[{python}, {run.parent / 'poison.py'}]"
    return Training(slurm, run, 2, stages=STAGES, preflight="never", launcher=launcher, supervisor_python=python)


class _HangingRanks:
    """Each rank hangs as soon as it is there, as where a file system does not answer, until the job's time is over."""

    def __init__(self) -> None:
        self._limited = 0

    def __call__(self, training: Training) -> None:
        signal_all(training.ranks(), signal.SIGSTOP)  # again and again: Slurm continues whom it asks to end
        lives = training.notes().count("started")
        if lives > self._limited and training.state() == "RUNNING":
            training.slurm("scontrol", "update", f"jobid={training.id}", "EndTime=now+1")
            self._limited = lives


def _of_an_array(name: str, slurm: Slurm, run: Path) -> None:
    shutil.rmtree(run / "tokenize")
    cluster = cluster_file(run.parent, stages="{tokenize: {array: 3}}")
    slurm.smalti("submit", str(run / "config.yaml"), "--cluster", str(cluster), "--only", "tokenize")
    jobs = {entry["script"]: entry["id"] for entry in json.loads((run / "slurm" / "jobs.json").read_text())}
    at_work = wait_until("a task", lambda: processes_of(jobs["tokenize.tasks"], "stages.tokenize"), share=0.5)
    hit = time.time()
    os.kill(at_work[0], signal.SIGKILL)
    wait_until("the join", lambda: slurm.states()[jobs["tokenize"]] not in ("PENDING", "RUNNING", "COMPLETING"))
    records = [read_record(record_path(run, "tokenize", task)).lives for task in range(3)]
    again = [task for task in records if len(task) > 1]
    said = ", ".join("+".join(life.outcome for life in task) for task in again)
    joined = (run / "tokenize" / "_SUCCESS").stat().st_mtime - hit
    _tell(name, said, again[0][1].started - hit if again else None, f"joined after {joined:.1f} s")


if __name__ == "__main__":
    main()
