"""Faults of a training on a real Slurm: what happens, and after how long it trains again.

    python -m benchmarks.slurm_faults [WORD ...]     # faults with one of these words in their names; all

On `slurm/testbed`, a transformer of 2 nodes × 1 process trains on and on while one fault after the other hits it.
For each: how its life ended, by the supervisor's record; seconds until Slurm started the job again; seconds until a
step was logged after that, which on this machine is mostly the start of Python. Time limits count from the end of the
life, as Slurm looks at them every 30 s. The testbed requeues after 6 s, asks dead nodes for 6 s and kills after 5 s; a
cluster's defaults are 121, 300 and 30 s: add the difference.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import TINY
from tests.launch import launch
from tests.slurm.conftest import Slurm, Training, start, stop, wait_until

LONG = ["transformer.training.steps=1000000", "transformer.training.checkpoint_every=20"]


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
    overrides = [f"runs={folder}", "tracking.enabled=false", *LONG]
    for stage in ("prepare", "text-tokenizer", "image-tokenizer", "tokenize"):
        launch("pipeline", "run", str(TINY), *overrides, "--only", stage)
    training = Training(slurm, folder / "tiny", 2, "preempt", stages="{transformer: {nodes: 2, tasks_per_node: 1}}")
    faults: dict[str, Callable[[], object]] = {
        "a rank is killed (SIGKILL)": lambda: os.kill(training.ranks()[1], signal.SIGKILL),
        "a rank dies (SIGSEGV)": lambda: os.kill(training.ranks()[1], signal.SIGSEGV),
        "preemption, no grace": lambda: _preempt(slurm, 0),
        "preemption, 60 s of grace": lambda: _preempt(slurm, 60),
        "the time limit is near": lambda: _at_the_limit(training, "now+1minute"),
        "the time limit is here before they saved": lambda: _at_the_limit(training, "now+1"),
        "scontrol requeue": lambda: slurm("scontrol", "requeue", str(training.id)),
        "scancel --signal=USR2": lambda: slurm("scancel", "--signal=USR2", str(training.id)),
        "a node dies and is back after 10 s": lambda: _power_cut(slurm),
        "the controller is away for 10 s": lambda: _controller(slurm),
        "USR2 where requeue is forbidden": lambda: _without_requeue(training),
    }
    print(f"{'fault':<44}{'life ended as':<16}{'job again':>10}{'training again':>16}", flush=True)
    _wait_for_a_step(training, 0.0)
    words = sys.argv[1:]
    for name, fault in faults.items():
        if words and not any(word in name for word in words):
            continue
        lives, hit = len(training.lives()), time.time()
        fault()
        if "controller" in name:
            again, outcome = None, "goes on"
        else:
            wait_until(name, lambda lives=lives: len(training.lives()) > lives)  # type: ignore[misc]
            before, now = training.lives()[-2:]
            hit = before["ended"] if "time limit" in name else hit
            again, outcome = now["started"] - hit, before["outcome"] or "by Slurm"
        back = _wait_for_a_step(training, hit + (again or 10.0)) - hit
        print(f"{name:<44}{outcome:<16}{'' if again is None else f'{again:.1f} s':>10}{back:>14.1f} s", flush=True)


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


if __name__ == "__main__":
    main()
