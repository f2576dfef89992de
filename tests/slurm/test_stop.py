"""Whatever ends a job, the run goes on by itself and ends with the same weights; only a crash ends it, and says so."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.slurm.conftest import Slurm, cluster_file, processes_of, signal_all, wait_until, weights

# Four ranks, two nodes and a controller on a machine of two cores: a life may come late once; a second try is told.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.flaky(reruns=1)]
USR2_BIT = 1 << (signal.SIGUSR2 - 1)


class Training:
    """The transformer of a run, on its way through Slurm."""

    def __init__(self, slurm: Slurm, run: Path, partition: str = "normal", only: bool = True) -> None:
        self.slurm, self.run = slurm, run
        cluster = str(cluster_file(run.parent, partition))
        slurm.smalti(
            "submit", str(run / "config.yaml"), "--cluster", cluster, *(["--only", "transformer"] if only else [])
        )
        self.jobs = {entry["script"]: entry["id"] for entry in json.loads((run / "slurm" / "jobs.json").read_text())}
        self.id = self.jobs["transformer"]

    def step(self) -> int:
        path = self.run / "transformer" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_steps(self, life: int) -> list[int]:
        """Wait until life number `life` of the job has trained a little; its processes, all four asleep."""
        wait_until(f"life {life}", lambda: self.notes().count("started") > life)
        before = self.step()
        wait_until("a step", lambda: self.step() not in (before, 150) and len(self.ranks()) == 4)
        ranks = self.ranks()
        signal_all(ranks, signal.SIGSTOP)
        return ranks

    def ranks(self) -> list[int]:
        return processes_of(self.id, "stages.transformer")

    def notes(self) -> list[str]:
        path = self.run / "slurm" / "transformer.history"
        return [line.split("\t")[2] for line in path.read_text().splitlines()] if path.exists() else []

    def state(self) -> str:
        return self.slurm.job(self.id, "JobState")

    def wait_for_the_end(self) -> None:
        wait_until("the end", lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED"))


def _run_into_the_time_limit(training: Training, ranks: list[int]) -> None:
    """Slurm looks every 30 s who is near a limit. The ranks sleep until its signal is there, however fast they are."""
    training.slurm("scontrol", "update", f"jobid={training.id}", "EndTime=now+1minute")
    wait_until("USR2", lambda: all(map(_has_been_signalled, ranks)), 45)
    signal_all(ranks, signal.SIGCONT)
    wait_until("the requeue", lambda: training.state() == "PENDING", 60)
    training.slurm("scontrol", "update", f"jobid={training.id}", "TimeLimit=30")


def _has_been_signalled(process: int) -> bool:
    """Of a process that slept: USR2 waits for it, or Slurm has woken it (some versions send CONT first)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    values = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return not values["State"].startswith("T") or bool(int(values["ShdPnd"], 16) & USR2_BIT)


def test_three_time_limits_a_preemption_and_a_dead_node_change_no_bit(
    slurm: Slurm, run_copy: Path, local_run: Path
) -> None:
    training = Training(slurm, run_copy, partition="preempt")
    for life in range(3):
        ranks = training.wait_for_steps(life)
        if life == 0:  # as good a moment as any: nobody else may write here
            refused = slurm.smalti("--config", str(run_copy / "config.yaml"), module="stages.transformer", check=False)
            assert "stage transformer is already being written by process" in refused
            assert f"(Slurm job {training.id})" in refused
        _run_into_the_time_limit(training, ranks)

    signal_all(training.wait_for_steps(3), signal.SIGCONT)
    slurm("sbatch", "--wait", "-p", "normal", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")

    signal_all(training.wait_for_steps(4), signal.SIGCONT)
    slurm.testbed("crash", "node2")
    wait_until("the loss noticed", lambda: training.state() == "PENDING", 60)
    slurm.testbed("boot", "node2")

    training.wait_for_the_end()
    assert training.state() == "COMPLETED"
    notes = training.notes()
    assert notes.count("time limit") == 3
    lives = notes.count("started")
    assert lives >= 6  # on a busy machine Slurm may ask once more
    assert weights(run_copy, "transformer") == weights(local_run, "transformer")
    log = slurm.smalti("logs", str(run_copy), "transformer", "-n", "0")
    assert log.count("transformer: goes on from step ") == lives - 1


def test_a_user_signal_and_a_requeue_by_hand_lose_nothing_and_cancel_ends_it(slurm: Slurm, run_copy: Path) -> None:
    training = Training(slurm, run_copy)
    theirs = int(slurm("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 300"))
    signal_all(training.wait_for_steps(0), signal.SIGCONT)
    slurm("scancel", "--signal=USR2", str(training.id))
    signal_all(training.wait_for_steps(1), signal.SIGCONT)
    slurm("scontrol", "requeue", str(training.id))
    signal_all(training.wait_for_steps(2), signal.SIGCONT)
    assert training.notes().count("asked to stop") == 1
    assert f"cancelled: {training.id}" in slurm.smalti("cancel", str(run_copy))
    wait_until("its end", lambda: training.state() == "CANCELLED", 30)
    assert slurm.states()[theirs] in ("PENDING", "RUNNING")
    assert "is queued or running" in slurm.smalti("cancel", str(run_copy))
    slurm("scancel", str(theirs))


def test_a_crash_ends_its_dependents_and_status_says_which_rank_said_what(slurm: Slurm, run_copy: Path) -> None:
    training = Training(slurm, run_copy, only=False)
    ranks = training.wait_for_steps(0)
    os.kill(ranks[2], signal.SIGKILL)
    signal_all([rank for rank in ranks if rank != ranks[2]], signal.SIGCONT)
    training.wait_for_the_end()
    assert training.state() == "FAILED"
    wait_until("no dependent pending", lambda: not slurm("squeue", "-h", "--me").strip(), 30)
    states = {script: slurm.states()[job] for script, job in training.jobs.items()}
    assert states == {**dict.fromkeys(states, "CANCELLED"), "transformer": "FAILED"}
    table = slurm.smalti("status", str(run_copy))
    assert "transformer failed: rank 2 on node2 died first (exit 137); the last it said:" in table
    assert "Killed" in table

    # Put right, it goes on where it was: what failed, and what waited for it.
    again = slurm.smalti("resubmit", str(run_copy))
    assert [line.split()[0] for line in again.splitlines() if "submitted" in line] == [
        *("transformer", "generate", "generate", "evaluate", "report")
    ]
    slurm.smalti("cancel", str(run_copy))
    wait_until("an empty queue", lambda: not slurm("squeue", "-h", "--me").strip(), 60)


def test_a_users_mistake_is_told_once_and_leaves_nothing_pending(slurm: Slurm, tmp_path: Path) -> None:
    source = "prepare.source={kind: folder, path: /nowhere/at/all}"
    cluster = str(cluster_file(tmp_path))
    slurm.smalti("submit", str(TINY), f"runs={tmp_path}", source, "--cluster", cluster)
    wait_until("an empty queue", lambda: not slurm("squeue", "-h", "--me").strip(), 60)
    listed = {entry["stage"]: entry for entry in json.loads(slurm.smalti("status", str(tmp_path / "tiny"), "--json"))}
    assert listed["prepare"]["state"] == "FAILED"
    assert "error: " in listed["prepare"]["failure"]
    assert "/nowhere/at/all" in listed["prepare"]["failure"]
    assert {entry["state"] for stage, entry in listed.items() if stage != "prepare"} == {"CANCELLED"}


def test_a_host_that_cannot_read_the_inputs_is_named_and_left(slurm: Slurm, run_copy: Path) -> None:
    slurm.testbed("on", "node1", "mount", "-t", "tmpfs", "none", str(run_copy / "tokenize"))
    cluster = cluster_file(run_copy.parent, stages="{transformer: {nodes: 1, gpus: 2}}")
    slurm.smalti("submit", str(run_copy / "config.yaml"), "--cluster", str(cluster), "--only", "transformer")
    job = json.loads((run_copy / "slurm" / "jobs.json").read_text())[-1]["id"]
    wait_until("work on the other node", lambda: processes_of(job, "stages.transformer"))
    assert slurm.job(job, "NodeList") == "node2"
    assert slurm.job(job, "ExcNodeList") == "node1"
    log = slurm.smalti("logs", str(run_copy), "transformer", "-n", "0")
    assert "preflight: host node1 is bad: cannot read a finished tokenize" in log
    slurm.smalti("cancel", str(run_copy))
    slurm.testbed("on", "node1", "umount", str(run_copy / "tokenize"))
