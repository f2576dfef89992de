"""This job, through Slurm's commands: what Slurm says of it, and how it comes back."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# Slurm asks every process of a job that it ends to end, too; what brings the job back must outlive that.
_DEAF = ["/bin/sh", "-c", 'trap "" TERM USR2; exec "$@"', "sh"]
# Slurm looks at time limits every 30 s, and may send its signal up to 60 s early.
_EARLY_S = 90.0
_OURS = "smalti:"  # in the comment of a job
_ANSWER_S = 30.0  # that hosts have to start a process, to be alive


class ThisJob:
    """The job that this process runs in, or the task of an array."""

    def __init__(self) -> None:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        self.task = int(task) if array and task else None
        self.name = f"{array}_{task}" if self.task is not None else os.environ["SLURM_JOB_ID"]
        self.hosts = call(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()

    def field(self, name: str) -> str:
        """One word of `scontrol show job`: JobState, Reason, EndTime, …; empty if Slurm does not answer."""
        found = re.search(rf"\b{name}=(\S+)", call(["scontrol", "show", "job", self.name]))
        return "" if found is None or found[1] in ("(null)", "N/A", "None") else found[1]

    def at_time_limit(self) -> bool:
        return self.field("Reason") == "TimeLimit"

    def near_time_limit(self, stop_ahead_s: float) -> bool:
        end = _seconds(self.field("EndTime"))
        return end is not None and end - time.time() <= stop_ahead_s + _EARLY_S

    def preempted(self) -> bool:
        """Where the partition has a GraceTime: the ranks were asked to stop, and have saved."""
        started, at = _seconds(self.field("StartTime")), _seconds(self.field("PreemptTime"))
        return started is not None and at is not None and at >= started

    def dead_hosts(self) -> tuple[str, ...]:
        """The hosts of this job on which Slurm can no longer start a process."""
        count = str(len(self.hosts))
        command = ["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
        answered = call([*command, "sh", "-c", 'echo "$SLURMD_NODENAME"'], timeout_s=_ANSWER_S).split()
        if not answered:  # not even this host, on which we live: the question failed
            states = call(["sinfo", "-h", "-N", "-n", ",".join(self.hosts), "-o", "%N %T"]).splitlines()
            return tuple(dict.fromkeys(line.split()[0] for line in states if "down" in line or line.endswith("*")))
        return tuple(host for host in self.hosts if host not in answered)

    def spare_hosts(self) -> int | None:
        """How many hosts of the partition this job could do without, those that it leaves out already not counted."""
        partition = self.field("Partition").split(",")[0]
        usable = "idle,alloc,mix,comp,planned,resv"
        up = set(call(["sinfo", "-h", "-N", "-p", partition, "-t", usable, "-o", "%N"]).split())
        if not up:
            return None
        return len(up - set(self._excluded())) - len(self.hosts)

    def controller_answers(self) -> bool:
        return re.search(r"\bUP\b", call(["scontrol", "ping"])) is not None

    def use_up_steps(self, count: int) -> None:
        """Start empty steps. When a node dies, Slurm keeps asking it to end its step (TERM, then KILL), even a minute
        later; if the node is back by then, the step of the same number after the requeue gets the signal."""
        for _ in range(count):
            call(["srun", "--nodes=1", "--ntasks=1", "true"], timeout_s=60)

    def requeue(self, exclude: Sequence[str]) -> bool:
        """Come back under the same id; False where the site or the job forbids that. It ends this process, soon."""
        excluded = self._excluded()
        if not _succeeds(["scontrol", "requeue", self.name]):
            return False
        if exclude:
            hosts = ",".join(dict.fromkeys([*excluded, *exclude]))
            _succeeds(["scontrol", "update", f"jobid={self.name}", f"excnodelist={hosts}"])
        return True

    def submit_successor(self, script: Path, exclude: Sequence[str]) -> str | None:
        """Submit the job file again, to start when this job has ended; its name, or None if sbatch refuses."""
        command = ["sbatch", "--parsable", f"--dependency=afterany:{self.name}"]
        if self.task is not None:
            command.append(f"--array={self.task}")
        if excluded := [*self._excluded(), *exclude]:
            command.append("--exclude=" + ",".join(dict.fromkeys(excluded)))
        # What this job's environment says of it (SLURM_…, SBATCH_…) would win over the job file.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        clean |= {name: value for name, value in os.environ.items() if name in ("SLURM_CONF",)}
        answer = call([*_DEAF, *command, str(script)], environment=clean).strip().split(";")[0]
        if not answer.isdecimal():
            return None
        return answer if self.task is None else f"{answer}_{self.task}"

    def move_dependents(self, successor: str) -> bool:
        """A job's dependents wait for its successor instead; those of an array for the successor of a task, too. One
        process at a time: Slurm knows no change of a dependency, only another one in its place. False: not all do."""
        mine = self.name.split("_")[0]
        listed = call(["squeue", "--me", "-h", "-o", "%A|%E|%k"]).splitlines()
        all_moved = bool(listed)  # this job itself is among them, if squeue has an answer
        for line in listed:
            job, dependency, comment = line.split("|", 2)
            if job == successor:
                continue
            whose: Literal["ours", "theirs"] = "ours" if _OURS in comment else "theirs"
            moved = moved_dependency(dependency, mine, successor, None if self.task is None else whose)
            if self.task is not None:  # `resubmit` lets a join wait for single tasks
                moved = moved_dependency(moved, self.name, successor)
            if moved != dependency:
                all_moved &= _succeeds(["scontrol", "update", f"jobid={job}", f"dependency={moved}"])
        return all_moved

    def _excluded(self) -> list[str]:
        listed = self.field("ExcNodeList")
        return call(["scontrol", "show", "hostnames", listed]).split() if listed else []


def moved_dependency(dependency: str, job: str, successor: str, array: Literal["ours", "theirs"] | None = None) -> str:
    """What squeue says of a dependency, `afterok:12(unfulfilled)`, with `successor` for `job`.

    Args:
        array: `job` is an array, and `successor` that of one of its tasks, so `job` stays beside it. The task may end
            at its time limit; of "ours", the join of the array, `afterany:12` lets it start all the same: it does
            itself what it finds missing.

    Returns it unchanged if it does not name `job`, or knows an "or" (?).
    """
    known = re.sub(r"\([^)]*\)", "", dependency)
    terms: dict[str, list[str]] = {}
    found = False
    for term in known.split(","):
        kind, *names = term.split(":")  # or a word alone: singleton
        waits_for = terms.setdefault(kind, [])
        for name in (name.removesuffix("_*") for name in names):  # squeue shows an array as 12_*
            if name != job or (kind != "afterok" and (kind, array) != ("afterany", "ours")):
                waits_for.append(name)
                continue
            found = True
            if array == "theirs":
                waits_for.append(name)
            elif array == "ours":
                terms.setdefault("afterany", []).append(name)
    if not found or "?" in known:
        return dependency
    terms.setdefault("afterok", []).append(successor)
    listed = {kind: dict.fromkeys(names) for kind, names in terms.items() if names or kind == "singleton"}
    return ",".join(":".join([kind, *names]) for kind, names in listed.items())


def call(command: Sequence[str], timeout_s: float = 120, environment: dict[str, str] | None = None) -> str:
    """What a command prints, until it is ended for taking too long; empty if it fails: a controller may be away."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired as late:
        return bytes(late.stdout or b"").decode(errors="replace")
    except OSError:
        return ""
    return done.stdout


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run([*_DEAF, *command]).returncode == 0


def _seconds(time_of_slurm: str) -> float | None:
    try:
        return time.mktime(time.strptime(time_of_slurm, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
