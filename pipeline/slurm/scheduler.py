"""Slurm's commands, and their output as text, since its JSON differs between versions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.errors import UserError

ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)
_MARK = re.compile(r"(?:^|; )smalti:(?P<script>[a-z.-]+):(?P<directory>.*)$")  # render.comment


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as Slurm knows it."""

    id: int  # of the array, for a task of one
    task: int | None
    script: str  # "transformer", "tokenize.tasks"
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""

    @property
    def name(self) -> str:
        return f"{self.id}" if self.task is None else f"{self.id}_{self.task}"

    @property
    def active(self) -> bool:
        return self.state not in ENDED

    @property
    def ending(self) -> bool:
        return self.state == "COMPLETING"


def jobs_of(run_directory: Path) -> list[Job]:
    """The user's jobs of this run that the controller still knows (it forgets ended ones after minutes), oldest first.

    Raises:
        UserError: there is no Slurm, or its controller does not answer.
    """
    answer = call(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%F|%K|%T|%r|%N|%L|%k"])
    jobs = []
    for line in answer.splitlines():
        job, task, state, reason, nodes, time_left, comment = line.split("|", 6)
        mark = _MARK.search(comment)
        if mark and mark["directory"] == str(run_directory):
            number = int(task) if task.isdigit() else None
            jobs.append(Job(int(job), number, mark["script"], state, _none(reason), _none(nodes), time_left))
    return sorted(jobs, key=lambda job: (job.id, job.task or 0))


def ended_states(ids: Sequence[int]) -> dict[str, str]:
    """From accounting: the states of jobs by name ("12", "12_3"). Empty where accounting is off."""
    if not ids:
        return {}
    listed = ",".join(map(str, ids))
    try:
        answer = call(["sacct", "-n", "-P", "-X", "-j", listed, "-o", "JobID,State"])
    except UserError:
        return {}
    # "CANCELLED by 1000" is one state.
    pairs = [line.split("|", 1) for line in answer.splitlines() if "|" in line]
    return {name: state.split()[0] for name, state in pairs if state}


def submit(script: Path, after: Sequence[str], array: str | None = None) -> int:
    """Submit a job file and return the job's id. `after`: jobs or tasks ("12_5") that must end with success first."""
    command = ["sbatch", "--parsable"]
    if after:
        command.append("--dependency=afterok:" + ":".join(after))
    if array:
        command.append(f"--array={array}")
    return int(call([*command, str(script)]).strip().split(";")[0])


def cancel(ids: Sequence[int]) -> None:
    if ids:
        call(["scancel", *map(str, ids)])


def record_job(run_directory: Path, script: str, number: int) -> None:
    """Add a submitted job to the jobs.json of its run."""
    path = run_directory / "slurm" / "jobs.json"
    known = read_json(path) if path.exists() else []
    write_json(path, [*known, {"script": script, "id": number, "run": str(run_directory)}])


def recorded_jobs(run_directory: Path) -> dict[str, int]:
    """The newest job of each job file, from jobs.json. The jobs of the run that this one is a copy of are not its."""
    path = run_directory / "slurm" / "jobs.json"
    entries = read_json(path) if path.exists() else []
    return {e["script"]: e["id"] for e in entries if e.get("run", str(run_directory)) == str(run_directory)}


def call(command: list[str]) -> str:
    """What a command of Slurm prints. Raises UserError where it is missing, silent, or fails, with what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"expected Slurm's {command[0]} on this machine, found none: run this on a login node of the cluster,"
            f" or start a Slurm of your own with slurm/testbed"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} gave no answer for 120 s: is Slurm's controller up? (try `scontrol ping`)"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing"
        raise UserError(f"`{' '.join(command)}` failed (exit {done.returncode}), it said: {said}")
    return done.stdout


def _none(value: str) -> str:
    return "" if value in ("None", "(null)", "N/A") else value
