"""The supervisor's process on stand-ins for Slurm's commands, whose ranks say and do what a test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.rendezvous import Launched, did_not_meet
from tests.launch import ROOT

NODES = "printf '%s\\n' node1 node2"
# srun runs one rank, the second of two, and labels its lines; with `srun-code` it ends as if others had ended so.
SRUN = f"""case "$*" in
  *--overlap*) {NODES}; exit ;;
  *" true") exit ;;
esac
while [[ $1 != bash ]]; do shift; done
SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURMD_NODENAME=node2 "$@" 2>&1 | sed 's/^/1: /'
code=${{PIPESTATUS[0]}}
exit "$(cat srun-code 2>/dev/null || echo "$code")"
"""
SCONTROL = f"""echo "scontrol $*" >>calls
case "$*" in
  "show hostnames"*) {NODES} ;;
  "show job"*) echo "JobState=RUNNING Partition=normal EndTime=2099-01-01T00:00:00" ;;
  ping) cat ping 2>/dev/null || echo 'Slurmctld(primary) at node1 is UP' ;;
  requeue*) if [[ -e requeue-fails ]]; then . ./requeue-fails; exit 1; fi; kill -TERM $PPID ;;
  update*) [[ ! -e update-fails ]] ;;
esac
"""


class Job:
    """Lives of one job, in a folder that has the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.environment = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]", "PYTHONPATH": str(ROOT)}
        (self.run / "logs" / "slurm").mkdir(parents=True)
        self.log = self.run / "logs" / "slurm" / "transformer-12.log"
        self.says("srun", SRUN)
        self.says("scontrol", SCONTROL)
        for name in ("sinfo", "squeue", "sbatch"):
            self.says(name, f'echo "{name} $*" >>calls; exit 1')

    def says(self, command: str, lines: str) -> None:
        """The stand-in for one of Slurm's commands, or what a rank does (`rank`)."""
        (self.folder / command).write_text(f"#!/bin/bash\n{lines}\n")
        (self.folder / command).chmod(0o755)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        words = ["--stage", "transformer", "--module=stages.transformer", "--trains", "--srun", "srun --label"]
        words += ["--python", f"bash {self.folder}/rank", "--stop-ahead-s", "60", *options]
        words += ["--max-time-limits", "3", "--max-crashes", "3", "--max-bad-hosts", "3"]
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "pipeline" / "slurm" / "supervisor"), str(self.run), *words],
                env=os.environ | self.environment | {"PATH": f"{self.folder}:{os.environ['PATH']}"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def live(self, *options: str) -> int:
        """One life of the job; its exit code."""
        return self.start(*options).wait(60)

    def outcomes(self) -> list[str]:
        lives: list[dict[str, Any]] = json.loads((self.run / "slurm" / "transformer.lives.json").read_text())["lives"]
        return [life["outcome"] for life in lives]

    def calls(self, command: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(command)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


WATCHDOG = "Process group watchdog thread terminated with exception: [Rank 1] Watchdog caught collective operation"
FRAMES = "\n".join(f"frame #{n}: c10d::ProcessGroupNCCL::watchdogHandler() + 0x233 (0x7f in /x.so)" for n in range(7))
NCCL_TIMEOUT = f"""[rank1]:[E1012 05:20:33.1 ProcessGroupNCCL.cpp:2068] [PG ID 0 PG GUID 0(default_pg) Rank 1] {WATCHDOG} timeout
Exception raised from checkTimeout at ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:632 (most recent call first):
{FRAMES}
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] {WATCHDOG} timeout: WorkNCCL(SeqNum=2, OpType=ALLREDUCE)
Exception raised from checkTimeout at ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:632 (most recent call first):
{FRAMES}

Exception raised from ncclCommWatchdog at ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1901 (most recent call first):
{FRAMES}
"""  # noqa: E501
HANGS = (
    "error: rank 1 hangs: no sign of life for 600 s, since step 1200, in all_reduce, where it waits for other ranks;"
    " where each thread is: logs/transformer/rank-00001.log"
)


@pytest.mark.parametrize(("said", "end"), [(NCCL_TIMEOUT, "kill -ABRT $$"), (HANGS, "exit 70")])
def test_a_collective_that_times_out_is_no_bug_however_often_it_is_seen(said: str, end: str, job: Job) -> None:
    job.says("rank", f"cat <<'EOF'\n{said}\nEOF\n{end}")
    assert [job.live() for _ in range(3)] == [75] * 3, job.log.read_text()
    assert job.outcomes() == ["crash"] * 3


def test_the_same_error_twice_fails_a_job_at_once(job: Job) -> None:
    job.says("rank", "echo 'RuntimeError: hangs'; exit 1")
    assert [job.live() for _ in range(2)] == [75, 1]
    assert "the same error in the same place is no accident" in job.log.read_text()


def test_a_mistake_of_one_rank_fails_a_job_at_once_though_srun_has_killed_the_others(job: Job) -> None:
    job.says("rank", "echo 'error: expected a folder'; exit 2")
    (job.folder / "srun-code").write_text("137")
    assert job.live() == 2
    assert job.outcomes() == ["mistake"]
    assert "error: expected a folder" in job.log.read_text()


def test_a_crash_is_none_of_the_users_though_others_end_as_after_a_mistake(job: Job) -> None:
    job.says("rank", "echo 'ValueError: x'; exit 1")
    (job.folder / "srun-code").write_text("2")
    assert (job.live(), job.outcomes()) == (75, ["crash"])


@pytest.mark.parametrize(
    "cause", ["NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.27", "Timed out after 301 s"]
)
def test_ranks_that_do_not_reach_each_other_are_started_again(cause: str, job: Job) -> None:
    error = did_not_meet(Launched(1, 16, "node1", 12345, all_local=False), RuntimeError(cause))
    job.says("rank", f"cat <<'EOF'\nerror (rank 1): {error}\nEOF\nexit 2")
    assert [job.live() for _ in range(3)] == [75] * 3
    assert job.outcomes() == ["crash"] * 3


def test_a_job_that_crashes_while_the_controller_is_away_waits_for_it(job: Job) -> None:
    job.says("rank", "echo 'OSError: flaky'; exit 1")
    (job.folder / "requeue-fails").write_text("rm requeue-fails")  # it is back then
    (job.folder / "ping").write_text("Slurmctld(primary) at node1 is DOWN\n")
    assert job.live() == 75
    assert len(job.calls("scontrol requeue")) == 2
    assert job.calls("sbatch") == []
    assert "smalti resubmit" not in job.log.read_text()


def test_a_job_that_waits_for_the_controller_ends_when_slurm_ends_it_and_says_why(job: Job) -> None:
    job.says("rank", "echo 'OSError: flaky'; exit 1")
    (job.folder / "requeue-fails").write_text("[[ -e once ]] || kill -TERM $PPID; touch once")
    (job.folder / "ping").write_text("Slurmctld(primary) at node1 is DOWN\n")
    assert job.live() == 75
    assert "Slurm's controller does not answer, so job 12 could not be requeued: smalti resubmit" in job.log.read_text()


@pytest.mark.parametrize(
    ("squeue", "update", "code"),
    [
        ("echo '30|afterok:12(unfulfilled)|smalti:generate:/x'", True, 0),
        ("echo '30|afterok:12(unfulfilled)|smalti:generate:/x'", False, 75),
        ("exit 1", True, 75),
    ],
)
def test_what_waits_for_a_job_never_starts_where_it_cannot_be_made_to_wait_for_the_successor(
    squeue: str, update: bool, code: int, job: Job
) -> None:
    job.says("rank", "echo 'OSError: flaky'; exit 1")
    job.says("sbatch", "echo 15")
    job.says("squeue", squeue)
    (job.folder / "requeue-fails").touch()  # refused, by a controller that is there
    if not update:
        (job.folder / "update-fails").touch()
    assert job.live() == code
    assert ("smalti resubmit" in job.log.read_text()) == bool(code)
    assert json.loads((job.run / "slurm" / "jobs.json").read_text())[-1]["id"] == 15


def test_what_waits_for_a_task_of_an_array_waits_for_its_successor_and_for_the_other_tasks(job: Job) -> None:
    job.environment |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}
    job.says("rank", "exit 0")  # asked to stop
    job.says("sbatch", "echo 15")
    job.says("squeue", "echo '30|afterok:12_5(unfulfilled),afterok:12_6(unfulfilled)|smalti:tokenize:/x'")
    (job.folder / "requeue-fails").touch()
    assert job.live("--array-tasks", "8") == 0, job.log.read_text()
    assert job.calls("scontrol update") == ["scontrol update jobid=30 dependency=afterok:12_6:15"]
